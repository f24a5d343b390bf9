"""Installed packages against what this one asks for."""

import platform
import re
from importlib import metadata

from packaging.requirements import Requirement

from qvlm_plugin import __version__
from qvlm_plugin.doctor.finding import Finding, Status

PACKAGE = "qvlm_plugin"


def check_packages() -> list[Finding]:
    """A finding for the package, one for all that it requires and one for each of its extras."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        message = "not installed: neither lmms-eval nor plugins can find it"
        return [Finding(PACKAGE, Status.FAIL, message, "pip install . in a checkout")]
    requirements = [Requirement(line) for line in lines]
    findings = [Finding(PACKAGE, Status.OK, f"{__version__}, Python {platform.python_version()}")]
    extras = [extra for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or [] if extra != "test"]
    for extra in (None, *extras):
        needed = [each for each in requirements if _belongs(each, extra)]
        found = {each: _version(each.name) for each in needed}
        unmet = [each for each in needed if found[each] is None or not each.specifier.contains(found[each], True)]
        if not unmet:
            versions = ", ".join(f"{each.name} {found[each]}" for each in needed)
            findings.append(Finding(_subject(extra), Status.OK, versions))
            continue
        message = ", ".join(
            f"{each.name} {found[each] or 'missing'} (needs {each.specifier or 'any'})" for each in unmet
        )
        remedy = f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install --upgrade {PACKAGE}"
        findings.append(Finding(_subject(extra), Status.WARN if extra else Status.FAIL, message, remedy))
    return findings


def _subject(extra: str | None) -> str:
    return f"extra {extra!r}" if extra else "packages"


def _belongs(requirement: Requirement, extra: str | None) -> bool:
    named = re.search(r"extra == ['\"]([\w.-]+)['\"]", str(requirement.marker or ""))
    return (named and named[1]) == extra


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
