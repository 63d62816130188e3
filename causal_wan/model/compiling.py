"""torch.compile of the transformer's layers, for training."""

import torch
from torch._dynamo.utils import calculate_time_spent

from causal_wan.model.transformer import CausalWanTransformer3DModel


NUMBERS_OF_PROMPTS = 4  # of a clip: 1, 2, 4 and 8, see `causal_wan.model.conditions.embedded`


def compile_layers(transformer: CausalWanTransformer3DModel, num_shapes: int, **settings: object) -> None:
    """Compiles a transformer's layers: one graph for all of them, made anew for each shape of clips, and no other.

    Under LoRA it is two, since the first layer's input has no gradient. Shapes are compiled for as they come: a graph
    for any shape would be slower, and not one, since how many blocks a clip has is part of it. Where prompts change
    along clips, the number of prompts is part of a shape, too.

    Args:
        transformer: Changed in place; names of weights stay.
        num_shapes: How many shapes of batches there will be.
        settings: Of torch.compile, e.g. `backend`.

    Source: PyTorch's recipe of regional compilation.
    """
    limit = max(torch._dynamo.config.recompile_limit, 2 * NUMBERS_OF_PROMPTS * num_shapes)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    transformer.compile_repeated_blocks(**{"fullgraph": True, "dynamic": False, **settings})


def seconds_compiling() -> float:
    """Wall time that this process has spent compiling so far."""
    return calculate_time_spent().get("total_wall_time", 0.0)
