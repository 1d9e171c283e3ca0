"""What `make venv` asks before it installs: is this Python new enough, does this index answer.

Runs on any Python 3.6 or later: its first job is to say in words that the one found is too old.
"""

import sys
import urllib.request

OLDEST = (3, 11)
SECONDS = 5


def check_version() -> None:
    """Exit 1 with the way out when this interpreter is too old."""
    if sys.version_info[:2] < OLDEST:
        found = ".".join(str(part) for part in sys.version_info[:3])
        sys.exit(
            f"deltatune needs Python >= 3.11; {sys.executable} is Python {found}.\n"
            "Install a newer one, or name it: make venv PYTHON=/path/to/python3.12"
        )


def reachable(url: str) -> bool:
    """Whether `url` answers with success within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as reply:
            return reply.status == 200
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    check_version()
    if sys.argv[1:2] == ["--reachable"]:
        sys.exit(0 if reachable(sys.argv[2]) else 1)
