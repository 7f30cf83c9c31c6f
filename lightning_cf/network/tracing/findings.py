"""What a trace found so far, in labels: who uses which tensor, where units met, where values left the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Role
from lightning_cf.network.tracing.labels import NO_LABEL, Units
from lightning_cf.network.tracing.shadows import Origin


@dataclass(frozen=True)
class Use:
    """One use of a tensor by the network.

    Attributes:
        name: of the parameter or buffer.
        role: what it is there.
        origin: which of its entries the tensor used was made from.
        shape: of that tensor.
        target: labels of what each of its elements helps to compute; broadcasts with it, or names all that it meets.
        source: labels of what it reads.
        way: number of the way through the network that uses it.
        aside: whether what it is used for reaches nothing that the network returns.
    """

    name: str
    role: Role
    origin: Origin
    shape: tuple[int, ...]
    target: Tensor
    source: Tensor | None
    way: int = 0
    aside: bool = False


@dataclass(frozen=True)
class Found:
    """Labels that an operation united, or took out of the tensors."""

    operation: str
    module: str
    labels: Tensor
    unknown: bool


@dataclass
class Findings:
    """What a trace found so far.

    Attributes:
        tensors: parameters and buffers of the network by name.
        units: which labels are one.
        uses: every use of a tensor.
        norms: for modules by path, labels of the elements that each normalises together.
        mixings: where labels were united because an operation mixes units.
        reads: where values of units became numbers in Python.
        branches: where values of the network's input did.
        computed: of parameters that are changed before they are used, by what.
        written: of buffers that the forward pass writes, by what.
        made_by: of each tensor by its ``id``, the operation that gave it and its module.
        touched: names of tensors that were read, with the number of the way that did.
    """

    tensors: Mapping[str, Tensor]
    units: Units = field(default_factory=Units)
    uses: list[Use] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    mixings: list[Found] = field(default_factory=list)
    reads: list[Found] = field(default_factory=list)
    branches: list[Found] = field(default_factory=list)
    computed: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    made_by: dict[int, str] = field(default_factory=dict)
    touched: dict[tuple[str, int], None] = field(default_factory=dict)
    _entry_labels: dict[str, Tensor] = field(default_factory=dict)

    def labels_of_entries(self, name: str, numbers: Tensor) -> Tensor:
        """A label for each entry of a parameter, the same wherever the entry is met; ``numbers`` count the entries."""
        known = self._entry_labels.setdefault(name, torch.zeros(self.tensors[name].numel() + 1, dtype=torch.int64))
        new = numbers.unique()
        new = new[(new >= 0) & (known[new] == NO_LABEL)]
        known[new] = self.units.new(len(new))
        return known[numbers]  # the last one, for -1, stays 0

    def note_mixing(self, labels: Tensor, dims: Sequence[int], operation: str, unknown: bool, path: str) -> None:
        """Notes that an operation is about to unite labels along dims, where they are different ones."""
        resolved = self.units.resolve(labels)
        top = resolved
        for dim in dims:
            top = top.amax(dim, keepdim=True)
        differ = (resolved != top) & (resolved != NO_LABEL)
        if bool(differ.any()):
            for dim in dims:
                differ = differ.any(dim, keepdim=True)
            united = resolved[differ.expand(resolved.shape)].unique()
            self.mixings.append(Found(operation, path, united[united != NO_LABEL], unknown))

    def note_computed(self, names: Sequence[str], here: str) -> None:
        """Notes that an operation changes parameters before they are used."""
        self.computed |= dict.fromkeys(names, here)

    def note_written(self, x: Tensor, here: str) -> None:
        """Notes which of the network's tensors an operation writes to."""
        self.written |= {name: here for name, b in self.tensors.items() if x.numel() and same_memory(x, b)}

    def note_replaced(self, module: nn.Module) -> None:
        """Notes which buffers the forward pass put others in the place of."""
        for name, x in named_tensors(module).items():
            if x is not self.tensors.get(name) and id(x) in self.made_by:
                self.written[name] = self.made_by[id(x)]

    def all_uses(self) -> list[Use]:
        """Every use; also of buffers of which all that is known is that the forward pass reads them."""
        used = {use.name for use in self.uses}
        found = [(name, self.tensors[name], way) for name, way in self.touched if name not in used]
        return self.uses + [
            Use(
                name,
                "constant",
                Origin.whole(x),
                tuple(x.shape),
                torch.zeros((1,) * x.ndim, dtype=torch.int64),
                None,
                way,
            )
            for name, x, way in found
            if not isinstance(x, nn.Parameter)
        ]

    def makers_of(self, outputs: Sequence[Tensor]) -> str:
        """The operations that gave some tensors, for messages."""
        return " and ".join(dict.fromkeys(self.made_by[id(x)] for x in outputs if id(x) in self.made_by)) or "nothing"


def same_memory(x: Tensor, parameter: Tensor) -> bool:
    """Whether two tensors lie in the same memory, as a parameter and a view of it do."""
    return x.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
