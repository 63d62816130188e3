"""Context parallelism: the processes of a group share the tokens of a clip that is too long for one GPU to train on.

Each process holds an equal part of the tokens of *every* frame: modulation by frame stays valid, and all have the same
work. Only self-attention needs other tokens. Around it the processes exchange their part of the clip, with all heads,
for the whole clip with a part of the heads; so block-causal attention runs as on one process, on any backend.

The communication and its gradients are diffusers'. Its `enable_parallelism` makes the exchange in every attention call
instead, and takes gradients only of calls with as many keys as queries, which those of block-causal attention are not.

Shapes: B = batch, G = groups of tokens that share a timestep, L = tokens of a clip, D = width, N = heads, E = head
dim, P = processes of the group.

Source: DeepSpeed Ulysses, arXiv 2309.14509, section 3.1.
"""

from dataclasses import dataclass

import torch
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch.distributed.device_mesh import DeviceMesh


def check_divides_by_group(name: str, count: int, mesh: DeviceMesh | None) -> None:
    """Checks that the processes of a group can have equal parts.

    Raises:
        ValueError: If not.
    """
    if mesh is not None and count % mesh.size():
        raise ValueError(
            f"{name} must be a multiple of the {mesh.size()} processes that share a clip, got {count}; launch "
            "with another parallelism_config_cp_size."
        )


@dataclass(frozen=True)
class ContextParallel:
    """The part of a clip that this process has in one forward pass.

    Attributes:
        mesh: The processes that share the clip, one dimension.
        num_groups: G of a sample, 1 or the number of frames; the tokens of each are split.
    """

    mesh: DeviceMesh
    num_groups: int

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """This process's part `(B G, L / G P, D)` of the tokens `(B G, L / G, D)`, which all processes have."""
        return EquipartitionSharder.shard(tokens, 1, self.mesh).contiguous()  # a view would keep the whole in memory

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`. Gradients are those of one loss that all processes compute alike."""
        return EquipartitionSharder.unshard(tokens, 1, self.mesh)

    def gather_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, L / P, N, E)` -> `(B, L, N / P, E)`: all tokens in the order of the clip, for a part of the heads."""
        states = SeqAllToAllDim.apply(self.mesh.get_group(), states, 2, 1)  # tokens of process 0, of process 1, ...
        return states.unflatten(1, (self.mesh.size(), self.num_groups, -1)).transpose(1, 2).flatten(1, 3)

    def gather_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, L, N / P, E)` -> `(B, L / P, N, E)`, the inverse of `gather_tokens`."""
        states = states.unflatten(1, (self.num_groups, self.mesh.size(), -1)).transpose(1, 2).flatten(1, 3)
        return SeqAllToAllDim.apply(self.mesh.get_group(), states, 1, 2)
