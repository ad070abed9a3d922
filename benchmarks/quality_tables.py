"""The runs of quality.py as one JSON, a table and two pictures."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import half_width, interval

__all__ = ["Results", "unpack", "write_tables"]

BUDGETS = ("updates", "epochs")
STAGES = ("proxy", "embed", "adapt", "score", "select", "train")
SEE_ALL = ("full", "RS2", "InfoBatch")  # with as many updates as everything, these are trained on everything


def write_tables(runs: Path, out: Path, methods: Sequence[str]) -> None:
    """Join each data set's folder of runs into `quality-NAME.json`, `.md`, `-ratio.png` and `-time.png`.

    Raises:
        ValueError: if there is no run.
    """
    if not runs.is_dir():
        raise ValueError(f"There is no folder {runs}: make runs first.")
    folders = [folder for folder in sorted(runs.iterdir()) if any(folder.glob("*.json"))]
    if not folders:
        raise ValueError(f"{runs} holds no runs: make them first.")
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        joined = join([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])
        lines = ",\n".join(json.dumps(row) for row in joined["runs"])
        made_with = ",\n".join(json.dumps(made) for made in joined["made_with"])
        path = out / f"quality-{folder.name}.json"
        path.write_text(f'{{"made_with": [\n{made_with}\n],\n"runs": [\n{lines}\n]}}\n')
        results = Results(joined["runs"], methods, joined["made_with"])
        path.with_suffix(".md").write_text(results.page(folder.name))
        results.draw_by_ratio(out / f"quality-{folder.name}-ratio.png")
        results.draw_by_time(out / f"quality-{folder.name}-time.png")


def join(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs, and once each what they were made with."""
    made_with: list[dict[str, Any]] = []
    rows = []
    for run in runs:
        made = {name: run.pop(name) for name in ("versions", "machine", "experiment") if name in run}
        if made not in made_with:
            made_with.append(made)
        rows.append(run | {"made_with": made_with.index(made)})
    return {"made_with": made_with, "runs": rows}


def unpack(path: Path) -> list[dict[str, Any]]:
    """The runs of a `quality-NAME.json`, each with what it was made with, as they were before they were joined.

    Raises:
        ValueError: if the file is not one that `write_tables` wrote.
    """
    try:
        joined = json.loads(path.read_text())
        made_with, rows = joined["made_with"], joined["runs"]
        return [{name: row[name] for name in row if name != "made_with"} | made_with[row["made_with"]] for row in rows]
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold the joined runs of a data set ({error!r}).") from None


class Results:
    """All runs on one data set.

    Args:
        rows: the runs, without versions and machine.
        methods: in the order of the tables.
        made_with: what rows refer to by number: versions, machine, experiment.
    """

    def __init__(
        self, rows: list[dict[str, Any]], methods: Sequence[str], made_with: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.methods = [method for method in methods if any(row["method"] == method for row in rows)]
        self.settings = sorted({row["setting"] for row in rows}, key=_rank)
        self.ratios = sorted({row["keep"] for row in rows} - {"1"})
        self.states = len({json.dumps(made.get("experiment")) for made in made_with})
        self._of: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
        self.made_on: dict[str, set[str]] = {}  # machine: methods
        for row in rows:
            row = row | {"machine": _machine(made_with[row["made_with"]]) if made_with else ""}
            key = (row["setting"], row["method"], row["keep"], row["budget"])
            self._of.setdefault(key, {})[row["seed"]] = row
            self.made_on.setdefault(row["machine"], set()).add(row["method"])
        self.clocked = max(sorted(self.made_on), key=lambda machine: len(self.made_on[machine]), default="")

    def of(self, setting: str, method: str, keep: str, budget: str) -> dict[int, dict[str, Any]]:
        """The runs by seed, also where one run stands for all ratios, or training on everything for a method."""
        if method == "full" or (method == "RS2" and budget == "updates"):
            return self._of.get((setting, "full", "1", "updates"), {})
        if method == "InfoBatch" and budget == "updates":
            keep = "1"
        return self._of.get((setting, method, keep, budget), {})

    def figures(self, figure: str, *where: str) -> list[float]:
        """One figure of these runs, in percent."""
        return [100 * row[figure] for row in self.of(*where).values()]

    def competing(self, setting: str, budget: str) -> list[str]:
        """Who can be best: not who knows the truth, nor who sees all of a clean data set equally often."""
        out = {"oracle", *(SEE_ALL if setting == "none" and budget == "updates" else ("full",) * (setting == "none"))}
        return [method for method in self.methods if method not in out]

    def columns(self, setting: str) -> list[tuple[str, str]]:
        """Ratios and budgets that some method was run at."""
        every = [(keep, budget) for keep in self.ratios for budget in BUDGETS]
        return [(k, b) for k, b in every if any((setting, method, k, b) in self._of for method in self.methods)]

    def best(self, setting: str, keep: str, budget: str) -> list[str]:
        """The competing methods that none is ahead of, over the seeds that both have; none where one runs alone."""
        there = [m for m in self.competing(setting, budget) if self.of(setting, m, keep, budget)]

        def behind(method: str, other: str) -> bool:
            return bool(gains := self.gains(setting, method, other, keep, budget)) and _mean(gains) < 0

        return [m for m in there if not any(behind(m, other) for other in there)] if len(there) > 1 else []

    def page(self, name: str) -> str:
        """The whole Markdown file."""
        machines = "; ".join(f"{machine} ({self._list(self.made_on[machine])})" for machine in sorted(self.made_on))
        lines = [
            f"# Quality: {name}",
            "",
            "Test accuracy in % (mean ± 95 % interval, Student's t over the seeds; (n): of n, where that is fewer) by "
            "method, share of the data kept and length of training: as many updates as everything takes, or as many "
            "epochs. Bold: none is ahead over the seeds that both have, but for the oracle, and but for training on "
            "all of a clean data set. Noise, damage (% of what is trained on) and balance (smallest class in % of the "
            "largest) at the middle ratio. RS2 with as many updates is training on everything; InfoBatch chooses its "
            "share by itself. CCS is told how many labels are wrong; EL2N's and forgetting's networks are trained for "
            "a few epochs only (see the benchmark).",
            "",
            f"Made by `python benchmarks/quality.py {name}` on {machines}, in {self.states} state(s) of the code; each "
            "row of the JSON tells which.",
        ]
        for setting in self.settings:
            lines += ["", f"## {setting}", "", *self.table(setting), "", *self.verdict(setting)]
        return "\n".join([*lines, "", "## Seconds", "", *self.costs(), ""])

    def table(self, setting: str) -> list[str]:
        """A row a method."""
        columns = self.columns(setting)
        middle = self.ratios[len(self.ratios) // 2]
        heads = [f"{float(keep):.0%}, {budget}" for keep, budget in columns]
        lines = [
            "| method | seeds | " + " | ".join([*heads, "noise", "damage", "balance"]) + " |",
            "|---|" + "---|" * (len(columns) + 4),
        ]
        best = {column: self.best(setting, *column) for column in columns}
        for method in self.methods:
            values = {column: self.figures("accuracy", setting, method, *column) for column in columns}
            seeds = max((len(each) for each in values.values()), default=0)
            if not seeds:
                continue
            cells = []
            for column, each in values.items():
                cell = interval(each, 1) if each else ""
                cell = f"**{cell}**" if method in best[column] else cell
                cells.append(f"{cell} ({len(each)})" if 0 < len(each) < seeds else cell)
            at = [(setting, method, middle, budget) for budget in BUDGETS if self.of(setting, method, middle, budget)]
            for figure in ("noise_left", "damaged_left", "balance"):
                cells.append(f"{np.mean(self.figures(figure, *at[0])):.1f}" if at else "")
            lines.append(f"| {method} | {seeds} | " + " | ".join(cells) + " |")
        return lines

    def verdict(self, setting: str) -> list[str]:
        """Column by column: ours against the best of the others, and against training on all of clean data."""
        found: dict[str, list[str]] = {"Ahead": [], "Within the interval": [], "Behind": [], "One seed": []}
        beside_all = []
        for keep, budget in self.columns(setting):
            where = f"{float(keep):.0%}, equal {budget}"
            rivals = {
                method: gains
                for method in self.competing(setting, budget)
                if method != "ours" and (gains := self.gains(setting, "ours", method, keep, budget))
            }
            if rivals:
                rival = min(rivals, key=lambda method: _mean(rivals[method]))
                found[_outcome(rivals[rival])].append(f"{where}: {_by(rivals[rival])} {rival}")
            gains = self.gains(setting, "ours", "full", keep, budget)
            if gains and "full" not in self.competing(setting, budget):
                beside_all.append(f"{where}: {_by(gains)} it")
        lines = [f"{name} ({len(columns)}): {'; '.join(columns)}." for name, columns in found.items() if columns]
        if lines:
            lines[0] = "Ours against the best of the others, paired by seed. " + lines[0]
        if beside_all:
            lines.append(f"Ours against training on everything: {'; '.join(beside_all)}.")
        return ["\n\n".join(lines)] if lines else []

    def gains(self, setting: str, method: str, other: str, keep: str, budget: str) -> list[float]:
        """By how many points one method is better than another, seed by seed."""
        own, others = (self.of(setting, name, keep, budget) for name in (method, other))
        return [100 * (own[seed]["accuracy"] - others[seed]["accuracy"]) for seed in own if seed in others]

    def timed(self, *where: str) -> list[dict[str, Any]]:
        """Those of these runs whose seconds can be compared: on the machine that most methods were run on."""
        return [row for row in self.of(*where).values() if row["machine"] == self.clocked]

    def _list(self, methods: set[str]) -> str:
        return "all methods" if methods >= set(self.methods) else ", ".join(m for m in self.methods if m in methods)

    def costs(self) -> list[str]:
        """Mean seconds of each stage over settings, ratios and seeds, at equal updates."""
        lines = [
            "Mean seconds of the stages at equal updates, each as if nothing was there yet; "
            f"runs on {self.clocked} only.",
            "",
            "| method | " + " | ".join([*STAGES, "all"]) + " |",
            "|---|" + "---|" * (len(STAGES) + 1),
        ]
        for method in self.methods:
            where = list(itertools.product(self.settings, [method], self.ratios, ["updates"]))
            name, rows = method, [row for each in where for row in self.timed(*each)]
            if not rows and (others := [row for each in where for row in self.of(*each).values()]):
                machine = others[-1]["machine"]
                name, rows = f"{method} (on {machine})", [row for row in others if row["machine"] == machine]
            if rows:
                took = [float(np.mean([row["seconds"].get(stage, 0.0) for row in rows])) for stage in STAGES]
                lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in [*took, sum(took)]) + " |")
        if any(" (on " in line for line in lines):
            lines[0] += " Methods that another machine is named for ran on that one alone: not to be compared."
        return lines

    def draw_by_ratio(self, path: Path) -> None:
        """Accuracy, with its interval, against the share kept, at equal updates, a panel a setting."""
        figure, panels, colours = self._panels(self.settings)
        for axes, setting in zip(panels, self.settings, strict=False):
            for method in self.methods:
                points = [
                    (100 * float(keep), np.mean(values), half_width(values) if len(values) > 1 else 0.0)
                    for keep in self.ratios
                    if (values := self.figures("accuracy", setting, method, keep, "updates"))
                ]
                if points:
                    style = "--" if method in SEE_ALL else ":" if method == "oracle" else "-"
                    kept, accuracy, half = zip(*points, strict=True)
                    look = {"marker": ".", "elinewidth": 0.6, "color": colours[method]}
                    axes.errorbar(kept, accuracy, half, linestyle=style, label=method, **look)
            axes.set_xlabel("kept, %")
        self._finish(figure, path)

    def draw_by_time(self, path: Path) -> None:
        """Accuracy against seconds of everything from embedding and proxies to training, by one machine's clock."""
        settings = [setting for setting in self.settings if self._compares_times(setting)] or self.settings[:1]
        figure, panels, colours = self._panels(settings)
        for axes, setting in zip(panels, settings, strict=False):
            for method in self.methods:
                for budget, marker in zip(BUDGETS, "o^", strict=True):
                    found = [rows for keep in self.ratios if (rows := self.timed(setting, method, keep, budget))]
                    seconds = [np.mean([sum(row["seconds"].values()) for row in rows]) for rows in found]
                    accuracy = [np.mean([100 * row["accuracy"] for row in rows]) for rows in found]
                    label = method if marker == "o" else None
                    axes.scatter(seconds, accuracy, s=18, marker=marker, color=colours[method], label=label)
            axes.set_xscale("log")
            for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                ticks(lambda seconds, _: f"{seconds:g}")
            axes.tick_params(axis="x", which="both", labelsize=7)
            axes.set_xlabel("seconds in all (circles: equal updates, triangles: equal epochs)")
        self._finish(figure, path)

    def _compares_times(self, setting: str) -> bool:
        """Whether the machine of the clock ran three methods or more."""
        timed = [any(self.timed(setting, m, keep, b) for keep in self.ratios for b in BUDGETS) for m in self.methods]
        return sum(timed) >= 3

    def _panels(self, settings: Sequence[str]) -> tuple[Any, Any, dict[str, Any]]:
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        columns = min(3, len(settings))
        rows = -(-len(settings) // columns)
        figure = Figure(figsize=(5.5 * columns + 1.5, 4 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, setting in zip(panels, settings, strict=False):
            axes.set_title(setting)
            axes.set_ylabel("test accuracy, %")
        for axes in panels[len(settings) :]:
            axes.set_axis_off()
        colours = {method: colormaps["tab20"](number % 20) for number, method in enumerate(self.methods)}
        return figure, panels, colours | {"ours": "black"}

    def _finish(self, figure: Any, path: Path) -> None:
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        for axes in figure.axes:
            found = axes.get_legend_handles_labels()
            handles, labels = found if len(found[1]) > len(labels) else (handles, labels)
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.savefig(path, dpi=80)


def _rank(setting: str) -> tuple[int, str]:
    """Clean first, then noise, then damage."""
    return (setting != "none") + setting.count(":"), setting


def _machine(made: dict[str, Any]) -> str:
    machine = made["machine"]
    return f"{machine['device']}, {machine['threads']} thread(s), {machine.get('precision', 'bfloat16')}"


def _mean(gains: Sequence[float]) -> float:
    return round(float(np.mean(gains)), 9)  # so that equals are equal


def _outcome(gains: Sequence[float]) -> str:
    """Which of two methods is better, by gains paired by seed."""
    if len(gains) == 1:
        return "One seed"
    if abs(_mean(gains)) <= half_width(gains):
        return "Within the interval"
    return "Ahead" if _mean(gains) > 0 else "Behind"


def _by(gains: Sequence[float]) -> str:
    """`1.2 ± 0.3 ahead of`, as it goes before the other's name."""
    if _mean(gains) == 0:
        return "equal to"
    ahead = _mean(gains) > 0
    return f"{interval(gains if ahead else [-gain for gain in gains], 1)} {'ahead of' if ahead else 'behind'}"
