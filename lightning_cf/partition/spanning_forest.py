"""Connected components of the graph of similar units, from a spanning forest that grows tile by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_cf.partition.similarity import Similarity


@dataclass(frozen=True)
class Forest:
    """A maximum spanning forest of a graph of units: at every threshold its components are the graph's.

    Attributes:
        units: how many units there are.
        edges: the two units of each edge; fewer edges than units.
        similarities: of each edge, falling.
    """

    units: int
    edges: Int64[Tensor, "edges 2"]
    similarities: Float64[Tensor, "edges"]

    def components(self, least: float = -math.inf) -> Int64[Tensor, "units"]:
        """A number for each unit, the same for all units that edges of ``least`` or more connect."""
        from scipy.sparse.csgraph import connected_components

        strong = self.similarities >= least
        kept = Forest(self.units, self.edges[strong], self.similarities[strong])
        _, labels = connected_components(kept._graph(), directed=False)
        return torch.from_numpy(labels).long()

    def merge(self, edges: Int64[Tensor, "more 2"], similarities: Float64[Tensor, "more"]) -> Forest:
        """The maximum spanning forest of its own edges and new ones; of equals, the earlier ones stay."""
        from scipy.sparse.csgraph import minimum_spanning_tree

        similarities, order = torch.cat([self.similarities, similarities]).sort(descending=True, stable=True)
        both = Forest(self.units, torch.cat([self.edges, edges])[order], similarities)
        ranks = torch.from_numpy(minimum_spanning_tree(both._graph()).data).long()
        kept = ranks.sort().values - 1
        return Forest(self.units, both.edges[kept], similarities[kept])

    def _graph(self) -> Any:
        from scipy.sparse import coo_matrix

        # Ranks stand for the similarities: they fall as costs should, and none is 0, which SciPy takes for no edge.
        ranks, (rows, columns) = torch.arange(1, len(self.edges) + 1), self.edges.T
        shape = (self.units, self.units)
        return coo_matrix((ranks.double().numpy(), (rows.int().numpy(), columns.int().numpy())), shape=shape).tocsr()


def spanning_forest(similarity: Similarity, tile: int, least: float = -math.inf) -> Forest:
    """The maximum spanning forest of the pairs of units whose similarity is ``least`` or more.

    Memory: its edges and those of one tile.

    Args:
        similarity: of the units.
        tile: units a side of the tiles in which they are compared.
        least: the smallest similarity that counts.
    """
    none = torch.empty(0, 2, dtype=torch.int64)
    forest = Forest(len(similarity), none, torch.empty(0, dtype=torch.float64))
    for rows, columns, values in similarity.tiles(tile):
        trees = forest.components()
        # Within a tree, a pair no more similar than the weakest edge cannot replace one: most need no sorting.
        weakest = float(forest.similarities[-1]) if len(forest.edges) else math.inf
        useful = (trees[rows][:, None] != trees[columns]) | (values > weakest)
        useful &= (values >= least) & (rows[:, None] < columns)
        row, column = useful.nonzero(as_tuple=True)
        if len(row):
            forest = forest.merge(torch.stack([rows[row], columns[column]], dim=1), values[row, column])
    return forest
