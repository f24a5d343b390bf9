"""Packages in a folder that comes before what is installed."""

from pathlib import Path


def write_package(folder: Path, name: str, version: str, source: str = "") -> None:
    """Write a package of one file, and its metadata."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text(f"{name}\n")
