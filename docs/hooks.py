"""MkDocs hook: links from a page to files of the repository outside docs/.

They work where the pages are read in the repository. On the site they lead to the repository if mkdocs.yml
has a repo_url, and are plain text otherwise. A link to a file that does not exist is a warning, so an error
in a strict build.
"""

import logging
import re
from pathlib import Path

LOG = logging.getLogger("mkdocs.hooks.repository_links")
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown, page, config, files):
    root = Path(config.config_file_path).parent.resolve()
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_path).parent

    def replace(match):
        text, target, anchor = match[1], (folder / match[2]).resolve(), match[3] or ""
        if target.is_relative_to(docs):  # a page, which MkDocs checks itself
            return match[0]
        path = target.relative_to(root).as_posix()
        if not target.exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_path, path)
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"

    return LINK.sub(replace, markdown)
