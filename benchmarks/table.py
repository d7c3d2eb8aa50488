"""The README's table of results, from the JSON files that run.py wrote.

python benchmarks/table.py            # write it between the markers in README.md; print it where they are missing
python benchmarks/table.py --check    # end with code 1 where README.md has another one
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
ORDER = (
    *("article", "article-base", "heads", "encode", "score", "cold", "scale", "trials"),
    *("thaw", "costs", "serve", "workers"),
)
NOTHING = "Nothing has been measured yet: `make bench` does."


def load(folder):
    """The results in a folder, in the order to show."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: ORDER.index(result["group"]) if result["group"] in ORDER else 99)


def shown(ratio):
    """A ratio in words: `17 times as fast`, or `62%`."""
    value = ratio["value"]
    if ratio["form"] == "share":
        return f"{value:.0%}"
    return f"{value:.1f} times as fast" if value < 10 else f"{value:.0f} times as fast"


def machine_text(machine):
    """One machine in a sentence."""
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if machine[flag]]
    versions = {**machine["versions"]["peers"], **machine["versions"]["headstart"]}
    names = ("torch", "transformers", "sentence-transformers", "setfit", "onnxruntime", "openvino")
    libraries = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    able = f" with {' and '.join(flags)}" if flags else ", without avx512_bf16 or amx"
    return f"{machine['cpu']}, {machine['cores']} cores{able}; {libraries}"


def render(results):
    """The table, and under it how and on what it was measured; no bare times, since those are of one machine."""
    if not results:
        return NOTHING
    lines = ["| what | headstart | against | |", "| --- | --- | --- | --- |"]
    for result in results:
        for ratio in result["ratios"]:
            lines.append(f"| {ratio['measure']} | {shown(ratio)} | {ratio['against']} | {ratio['note']} |")
    places = {}
    for result in results:
        place = f"{result['measured']}, {machine_text(result['machine'])}"
        places.setdefault(place, []).append(result["group"])
    rounds = max(result["repeats"] for result in results)
    lines += [
        "",
        f"By `make bench`: whole processes in turns, medians of {rounds} rounds (fewer for what takes minutes).",
    ]
    for place, groups in places.items():
        lines.append(f"Measured {place}" + (f" ({', '.join(groups)})." if len(places) > 1 else "."))
    if any(result["quick"] for result in results):
        lines.append("Some of it is of the quick trial, on few rows: these are no results.")
    return "\n".join(lines)


def placed(readme, table):
    """README's text with the table between its markers; None where it lacks them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}" if begin and end else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    arguments = parser.parse_args()
    table = render(load(arguments.results))
    old = arguments.readme.read_text(encoding="utf-8")
    new = placed(old, table)
    if new is None:
        print(table)
        say = f"{arguments.readme.name} has no {BEGIN} and {END}: the table above goes between them."
        sys.exit(say if arguments.check else print(say, file=sys.stderr))
    if arguments.check:
        sys.exit(None if new == old else f"{arguments.readme.name} is not of these results: run `make bench-table`.")
    arguments.readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
