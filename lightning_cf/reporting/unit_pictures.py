"""Pictures of a partition: the units as vectors, and how alike they are."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn.functional import pad

from lightning_cf.errors import ContinualError, RunWarning, check_choice, warn
from lightning_cf.partition.options import MEASURES
from lightning_cf.partition.similarity import Similarity
from lightning_cf.records.record import LayerRecord, PartitionRecord

MOST_ARROWS, MOST_UNITS, MOST_BOUNDS = 400, 512, 40
SAMPLE = 1024

KINDS = {"claimed": "#1b6ca8", "redundant": "#f0b27a", "of earlier tasks": "#b5b5b5"}


PICTURED = ("last", "all", "none")
"""Of which tasks pictures may be asked for."""


def write_unit_pictures(tasks: Path, which: str = "all") -> None:
    """Writes ``units.png`` and ``similarity.png`` beside the records of tasks' partitions.

    Args:
        tasks: the folder that holds a folder for each task.
        which: every task's, those of the last one that was partitioned, or none.
    """
    check_choice("unit pictures", "which", which, PICTURED)
    manifests = sorted(tasks.glob("*/partition.json"))
    for manifest in {"last": manifests[-1:], "all": manifests, "none": []}[which]:
        try:
            record = PartitionRecord.load(manifest.parent)
        except ContinualError as error:
            warn(f"{error} Its pictures are left out.", RunWarning)
            continue
        if not record.layers:
            continue  # a network that is its output layer alone has no units to show
        units_picture(record).savefig(manifest.parent / "units.png", dpi=150)
        similarity_picture(record).savefig(manifest.parent / "similarity.png", dpi=150)


def units_picture(record: PartitionRecord) -> Figure:
    """Units as vectors in two dimensions (US 12387107, paragraph 42 and FIG. 3), a row of panels a layer.

    The plane is that of the two leading right singular vectors of the candidates' weights before INVARIANCE, in a
    layer of more than 1024 candidates of an even sample of them; once INVARIANCE is over, a second panel shows the
    same units in the same plane. A panel draws at most 400 units: the claimed ones and an even sample of the others.
    """
    columns = 1 + any(layer.direction_after is not None for layer in record.layers)
    figure = Figure(figsize=(0.8 + 4.6 * columns, 1.4 + 4.9 * len(record.layers)), layout="constrained")
    for row, layer in zip(figure.subplots(len(record.layers), columns, squeeze=False), record.layers, strict=True):
        _draw_vectors(list(row), layer)
    figure.suptitle(f"Units of task '{record.task}' as vectors", parse_math=False)
    keys = [Line2D([], [], color=color, linewidth=2.5, label=kind) for kind, color in KINDS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def similarity_picture(record: PartitionRecord, layer: str | None = None) -> Figure:
    """Similarity of a layer's candidates, by default of each layer's, ordered by cluster.

    The largest cluster comes first, in each its representative; of more than 512 units an even sample is shown. What
    is not stored is computed from the record's weights before INVARIANCE.

    Raises:
        ContinualError: for a layer that the record does not have.
    """
    layers = [each for each in record.layers if layer in (None, each.name)]
    if not layers:
        known = ", ".join(each.name for each in record.layers)
        raise ContinualError(f"The record of task '{record.task}' has no layer '{layer}'; it has {known}.")
    columns = min(3, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(0.4 + 5.2 * columns, 0.6 + 4.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis, each in zip(axes, layers, strict=False):
        _draw_similarity(axis, each, str(record.constraints.get("measure", "weight")))
    for axis in axes[len(layers) :]:
        axis.remove()
    figure.suptitle(f"Similarity of the units of task '{record.task}'", parse_math=False)
    return figure


# Units as vectors


def _draw_vectors(axes: list[Axes], layer: LayerRecord) -> None:
    plane, kinds = _plane(layer), _drawn(layer)
    stages = {"before": (layer.magnitude, layer.direction)}
    if layer.magnitude_after is not None and layer.direction_after is not None:
        stages["after"] = (layer.magnitude_after, layer.direction_after)
    drawn = torch.cat(list(kinds.values()))
    tips = {stage: _project(*polar, plane) for stage, polar in stages.items()}
    across, up = _window(torch.cat([each[drawn] for each in tips.values()]))
    for axis, (stage, (magnitude, _)) in zip(axes, stages.items(), strict=False):
        axis.axhline(0, color="#e8e8e8", linewidth=0.8, zorder=0)
        axis.axvline(0, color="#e8e8e8", linewidth=0.8, zorder=0)
        for level, (kind, units) in enumerate(reversed(kinds.items()), start=1):
            _draw_arrows(axis, tips[stage][units], kind, level)
        length = magnitude[layer.candidates].double().square().sum()
        share = float(tips[stage][layer.candidates].square().sum() / length) if length > 0 else 1.0
        axis.set(xlim=across, ylim=up, aspect="equal")
        axis.set_xlabel(f"first singular direction\nplane shows {100 * share:.0f} % of the squared length", fontsize=9)
        axis.set_ylabel("second singular direction", fontsize=9)
        axis.set_title(
            f"{_short(layer.name)}, {stage} INVARIANCE\n{len(layer.non_redundant)} claimed,"
            f" {int((layer.owner < 0).sum())} redundant; {len(drawn)} of {len(layer.magnitude)} units drawn",
            fontsize=10,
            parse_math=False,
        )
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(stages) :]:
        axis.remove()


def _draw_arrows(axis: Axes, tips: Float64[Tensor, "arrows 2"], kind: str, level: int) -> None:
    x, y = tips.T.numpy()
    axis.quiver(
        [0.0] * len(tips),
        [0.0] * len(tips),
        x,
        y,
        angles="xy",
        scale_units="xy",
        scale=1,
        units="dots",
        width=2.0 if kind == "claimed" else 1.2,
        headwidth=4,
        color=KINDS[kind],
        alpha=1.0 if kind == "claimed" else 0.85,
        label=kind,
        zorder=level,
    )


def _plane(layer: LayerRecord) -> Float64[Tensor, "2 inputs"]:
    """The two leading right singular vectors, zeros in place of one that does not exist."""
    units = _evenly(layer.candidates, SAMPLE)
    vectors = layer.magnitude[units, None].double() * layer.direction[units].double()
    leading = torch.linalg.svd(vectors, full_matrices=False).Vh[:2]
    # Their signs differ from machine to machine: the units shall point to the right and upwards on the whole.
    signs = torch.where((vectors @ leading.T).sum(dim=0) < 0, -1.0, 1.0)
    return pad(signs[:, None] * leading, (0, 0, 0, 2 - len(leading)))


def _project(
    magnitude: Float[Tensor, "units"], direction: Float[Tensor, "units inputs"], plane: Float64[Tensor, "2 inputs"]
) -> Float64[Tensor, "units 2"]:
    return magnitude[:, None].double() * (direction @ plane.T.to(direction.dtype)).double()


def _drawn(layer: LayerRecord) -> dict[str, Int64[Tensor, "_"]]:
    """Numbers of the units to draw, by kind; redundant are all that the claim leaves free."""
    claimed = _evenly(layer.non_redundant, MOST_ARROWS)
    claims = torch.isin(torch.arange(len(layer.representative)), layer.non_redundant)
    others = _evenly((~claims).nonzero().flatten(), MOST_ARROWS - len(claimed))
    free = layer.owner[others] < 0
    return {"claimed": claimed, "redundant": others[free], "of earlier tasks": others[~free]}


def _window(points: Float64[Tensor, "points 2"]) -> list[tuple[float, float]]:
    """Limits of both axes: the smallest square around the points and the origin, with a margin."""
    points = points.nan_to_num(0, 0, 0)  # INVARIANCE may have diverged, and the picture is to show it
    least, most = points.amin(dim=0).clamp_max(0), points.amax(dim=0).clamp_min(0)
    half = 0.54 * max(float((most - least).max()), 1e-12)
    return [(float(middle) - half, float(middle) + half) for middle in (least + most) / 2]


# Similarity


def _draw_similarity(axis: Axes, layer: LayerRecord, measure: str) -> None:
    order, bounds = _by_cluster(layer)
    if layer.similarity is not None:
        matrix, shown, source = layer.similarity.tile(order, order), measure, ""
    else:
        units = layer.candidates[order]
        computed = Similarity(layer.direction[units], layer.bias[units])
        matrix, shown, source = computed.tile(slice(None), slice(None)), "weight", ", computed from the record"
    bounded = shown in MEASURES
    low, high = (-1.0, 1.0) if bounded else (float(matrix.min()), float(matrix.max()))
    image = axis.imshow(matrix.numpy(), vmin=low, vmax=high, cmap="RdBu_r" if bounded else "viridis")
    if len(bounds) <= MOST_BOUNDS:
        axis.hlines(bounds - 0.5, -0.5, len(order) - 0.5, color="black", linewidth=0.4)
        axis.vlines(bounds - 0.5, -0.5, len(order) - 0.5, color="black", linewidth=0.4)
    axis.set_title(
        f"{_short(layer.name)}: {len(layer.non_redundant)} clusters at threshold {layer.threshold:.3g}\n"
        f"{len(order)} of {len(layer.candidates)} units shown",
        fontsize=10,
        parse_math=False,
    )
    axis.set_xlabel("units, the largest cluster first", fontsize=9)
    axis.tick_params(labelsize=8)
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    bar = figure.colorbar(image, ax=axis, shrink=0.8, extend="min" if bool((matrix < low).any()) else "neither")
    bar.set_label(f"similarity ({shown} measure{source})", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if shown == measure and low <= layer.threshold <= high:
        bar.ax.axhline(layer.threshold, color="black", linewidth=1.5)


def _by_cluster(layer: LayerRecord) -> tuple[Int64[Tensor, "shown"], Int64[Tensor, "bounds"]]:
    """Places among the candidates of the units to show, in their order; and where a cluster begins in it, after 0."""
    cluster = layer.cluster[layer.candidates]
    rank = cluster.bincount().argsort(descending=True, stable=True).argsort()[cluster]
    leads = layer.representative[layer.candidates] == layer.candidates
    order = (2 * rank + ~leads).argsort(stable=True)
    ranks = rank[order]
    shown = _evenly(torch.arange(len(order)), MOST_UNITS)
    begins = pad(ranks[shown].diff() > 0, (1, 0), value=True)
    # The sample may have passed over the representative, which stands first.
    shown[begins] = torch.searchsorted(ranks, ranks[shown[begins]])
    return order[shown], begins.nonzero().flatten()[1:]


def _evenly(numbers: Int64[Tensor, "all"], most: int) -> Int64[Tensor, "some"]:
    if len(numbers) <= most:
        return numbers
    return numbers[torch.linspace(0, len(numbers) - 1, most, dtype=torch.float64).round().long()]


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:18]} ... {name[-18:]}"
