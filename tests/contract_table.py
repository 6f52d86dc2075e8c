"""Make the contract table of the README: every check on every optimizer. `python tests/contract_table.py --write`."""

import argparse
import functools
import json
import sys
from pathlib import Path

from contract import ROWS, run
from contract_checks import CHECKS
from contract_subjects import OURS, SUBJECTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = Path(__file__).with_name("contract.json")
BEGIN, END = "<!-- contract -->", "<!-- end of contract -->"
MARKS = {"pass": "✓", "fail": "✗", "n/a": "–", "gpu": "GPU"}


@functools.cache
def outcome(check, subject):
    """Run a check on a subject, once in a process."""
    return run(check, subject)


def results():
    """Return the outcome of every check that needs no GPU on every subject, as plain values."""
    found = {}
    for name, check in CHECKS.items():
        if not check.cuda:
            found[name] = {"row": check.row, "what": check.what}
            for subject in SUBJECTS:
                came = outcome(check, subject)
                found[name][subject.title] = {"verdict": came.verdict} | ({"why": came.why} if came.why else {})
    return {"subjects": {subject.title: subject.heading for subject in SUBJECTS}, "checks": found}


def verdict(found, row, subject):
    """Return what a row comes to for a subject: "fail" where one of its checks failed, "n/a" where none applies."""
    checks = [check for check in CHECKS.values() if check.row == row]
    if not any(subject.has(check.needs) for check in checks):
        return "n/a"
    if any(check.cuda for check in checks):
        return "gpu"
    came = {found["checks"][check.name][subject.title]["verdict"] for check in checks}
    return "fail" if "fail" in came else "pass"


def section(found):
    """Return the part of the README between the two markers."""
    lines = [
        "| row | what | " + " | ".join(subject.heading for subject in SUBJECTS) + " |",
        "|:--|:--|" + ":-:|" * len(SUBJECTS),
    ]
    verdicts = {subject.title: {row: verdict(found, row, subject) for row in ROWS} for subject in SUBJECTS}
    for row, what in ROWS.items():
        cells = " | ".join(MARKS[verdicts[subject.title][row]] for subject in SUBJECTS)
        lines.append(f"| {row} | {what} | {cells} |")
    lines += [
        "",
        "✓ holds, ✗ does not, – makes no sense for it, GPU: needs a GPU to be seen (`pytest -m cuda`).",
        "",
    ]
    for subject in SUBJECTS:
        rows = list(verdicts[subject.title].values())
        checks = [entry[subject.title]["verdict"] for entry in found["checks"].values()]
        lines.append(
            f"- {subject.heading}: {rows.count('pass')} of {rows.count('pass') + rows.count('fail')} rows, "
            f"{checks.count('pass')} of {checks.count('pass') + checks.count('fail')} checks"
        )
    lines += ["", "<details><summary>What each ✗ was</summary>", ""]
    for subject in SUBJECTS:
        for entry in found["checks"].values():
            came = entry[subject.title]
            if came["verdict"] == "fail":
                lines.append(_escaped(f"- {entry['row']}, {subject.title}, {entry['what']}: {came['why']}"))
    return "\n".join([*lines, "", "</details>"])


def _escaped(text):
    """Return `text` so that Markdown shows it as it is."""
    return "".join(f"\\{c}" if c in "\\`*_<>[]|" else c for c in text)


def shown(page):
    """Return what stands between the markers of a page."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main():
    """Print the section, or write it into the README with the results beside the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write README.md and tests/contract.json")
    write = parser.parse_args().write
    found = results()
    text = section(found)
    if write:
        page = README.read_text()
        README.write_text(page.replace(f"{BEGIN}{page.split(BEGIN)[1].split(END)[0]}{END}", f"{BEGIN}\n{text}\n{END}"))
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    else:
        print(text)
    ours = [name for name, entry in found["checks"].items() if entry[OURS.title]["verdict"] != "pass"]
    sys.exit(f"{OURS.title} fails {', '.join(ours)}" if ours else 0)


if __name__ == "__main__":
    main()
