"""Compare installed packages with the requirements of this one."""

import platform
import re
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qvlm_plugin import __version__
from qvlm_plugin.doctor.finding import Finding, Status

PACKAGE = "qvlm_plugin"


def check_packages() -> list[Finding]:
    """A finding for the package, one for all of its requirements, and one for each of its extras."""
    requirements = _requirements()
    if requirements is None:
        message = "not installed: neither lmms-eval nor plugins can find it"
        return [Finding(PACKAGE, Status.FAIL, message, "pip install . in a checkout")]
    findings = [Finding(PACKAGE, Status.OK, f"{__version__}, Python {platform.python_version()}")]
    extras = [extra for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or [] if extra != "test"]
    for extra in (None, *extras):
        needed = [each for each in requirements if _belongs(each, extra)]
        unmet = [each for each in needed if not is_met(each)]
        if not unmet:
            versions = ", ".join(f"{each.name} {version_of(each.name)}" for each in needed)
            findings.append(Finding(_subject(extra), Status.OK, versions))
            continue
        message = ", ".join(
            f"{each.name} {version_of(each.name) or 'missing'} (needs {_versions(each) or 'any'})" for each in unmet
        )
        remedy = f"pip install '{PACKAGE}[{extra}]'" if extra else install_command(unmet)
        findings.append(Finding(_subject(extra), Status.WARN if extra else Status.FAIL, message, remedy))
    return findings


def requirement_of(name: str) -> Requirement | None:
    """The requirement of this package, or of one of its extras, on a distribution; None if there is none."""
    wanted = canonicalize_name(name)
    return next((each for each in _requirements() or [] if canonicalize_name(each.name) == wanted), None)


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_met(requirement: Requirement) -> bool:
    """Whether an allowed version is installed."""
    version = version_of(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def install_command(requirements: Iterable[Requirement]) -> str:
    """The command that installs allowed versions."""
    return " ".join(["pip install", *(f"'{each.name}{_versions(each)}'" for each in requirements)])


def _requirements() -> list[Requirement] | None:
    """The requirements of this package and its extras; None if it is not installed."""
    try:
        return [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return None


def _versions(requirement: Requirement) -> str:
    """The version specifiers, the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def _subject(extra: str | None) -> str:
    return f"extra {extra!r}" if extra else "packages"


def _belongs(requirement: Requirement, extra: str | None) -> bool:
    named = re.search(r"extra == ['\"]([\w.-]+)['\"]", str(requirement.marker or ""))
    return (named and named[1]) == extra
