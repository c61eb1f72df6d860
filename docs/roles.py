"""Griffe extension: what docstrings write for Sphinx and help() becomes Markdown.

:class:`~ctld_cuda.CTLD` becomes `CTLD`, and the double colon before a block of code goes away. What is
returned gets its type, so that a colon in the sentence does not make its beginning the type.
"""

import re

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([^`]+)`")


def _shortened(match):
    return f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`"


class Roles(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = ROLE.sub(_shortened, obj.docstring.value)
            text = re.sub(r"^ *::$", "", text, flags=re.MULTILINE)
            if obj.is_function and obj.returns is not None:
                text = re.sub(
                    r"^( *Returns:\n *)", lambda match: f"{match[1]}{obj.returns}: ", text, flags=re.M
                )
            obj.docstring.value = text
