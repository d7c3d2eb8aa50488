"""Write docs/cli.md from the commands' own --help, or check that it is up to date.

python docs/generate_cli.py docs/cli.md
python docs/generate_cli.py --check docs/cli.md
"""

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    (),
    ("train",),
    ("evaluate",),
    ("predict",),
    ("lengths",),
    ("audit",),
    ("explain",),
    ("export",),
    ("calibrate",),
    ("push",),
    ("serve",),
    ("cache",),
    ("cache", "info"),
    ("cache", "clear"),
    ("demo",),
)
HEADER = """# Command line

Made from `--help` by `make fix`; `make check` compares it. Results go to stdout, progress and remarks to stderr. Exit
codes: 0 done; 2 something given cannot be used; 1 a fault of headstart; 130 Ctrl-C. Each long option may be written
with underscores instead of dashes.
"""


def help_of(command: tuple[str, ...]) -> str:
    """What `headstart COMMAND --help` prints, 100 columns wide."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    run = [sys.executable, "-m", "headstart.cli", *command, "--help"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def document() -> str:
    """The whole page."""
    sections = [HEADER]
    for command in COMMANDS:
        sections.append(f"## {' '.join(('headstart', *command))}\n\n```text\n{help_of(command)}\n```\n")
    return "\n".join(sections)


def main() -> int:
    """Write or compare; 1 when the page is out of date."""
    *flags, path = sys.argv[1:]
    page = Path(path)
    if flags == ["--check"]:
        if page.read_text(encoding="utf-8") != document():
            sys.stderr.write(f"{page} is not what --help says now: run `make fix`.\n")
            return 1
        return 0
    page.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
