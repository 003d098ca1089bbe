"""`python -m lingbot_nb`: see lingbot_nb/cli.py."""

import sys

# Before any import of ours: older Pythons fail on their syntax, with a message that helps nobody.
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("error: this is Python %d.%d, and lingbot_nb needs Python 3.11 to 3.13" % tuple(sys.version_info[:2]))  # noqa: UP031

from lingbot_nb.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
