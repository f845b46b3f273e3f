"""Where text comes from: one file a source, all listed in `SOURCES`."""

from pathlib import Path

from switchworks.config import ConfigError
from switchworks.data.sources.catalogs.gettext import Catalogs
from switchworks.data.sources.files import Files
from switchworks.data.sources.hub import HubDataset
from switchworks.data.sources.package_docs import PackageDocs
from switchworks.data.sources.python_docs import PythonDocs
from switchworks.data.sources.text_source import FirstDocuments, TextConfig, TextSource

SOURCES: dict[str, type[TextSource]] = {
    "files": Files,
    "hub": HubDataset,
    "python_docs": PythonDocs,
    "package_docs": PackageDocs,
    "catalogs": Catalogs,
}
"""Every data source by the name that `data.source` gives it. Register your own here."""


def source_class(config: TextConfig) -> type[TextSource]:
    """The class of the source that `config` names: `Files` if it has a path. Raises ConfigError,
    listing the sources, for an unknown name."""
    name = config.source if config.path is None else "files"
    if name not in SOURCES:
        raise ConfigError(
            f"data.source = {name!r} is not a source of text.\n"
            f"  Sources: {', '.join(SOURCES)}.\n"
            "  Your own: switchworks.data.SOURCES[NAME] = a TextSource, before the settings."
        )
    return SOURCES[name]


def open_source(config: TextConfig, cache: Path) -> TextSource:
    """The source that `config` names, limited to the first `config.documents` if that is set.
    Raises what `TextSource.open` raises."""
    source = source_class(config).open(config, cache)
    return source if config.documents is None else FirstDocuments(source, config.documents)
