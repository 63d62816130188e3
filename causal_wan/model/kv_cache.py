"""The memory of a rollout: keys and values of the frames generated so far, and of the prompt.

Shapes: B = batch, T = tokens a frame, l = tokens of a block, N = heads, E = head dim, S = prompt tokens.
"""

from dataclasses import dataclass

import torch

from causal_wan.devices import to_device


INT8_MAX = 127
CACHE_DTYPES = {"auto": None, "int8": torch.int8}
"""Precisions of a cache by the names of flags; None is that of the passes."""


@dataclass
class KeptStates:
    """Keys or values of the frames that a layer remembers.

    Attributes:
        shape: That there is room for, (B, capacity * T, N, E).
        dtype: That they are kept in; None is their own, whatever it is: under autocast it is not that of the weights.
        buffer: Of that shape; made when the first block is written.
        scales: Of int8, one a token and head, float32 `(B, capacity * T, N, 1)`.

    Source: int8 with the largest value's scale as in "LLM.int8()", arXiv 2208.07339, section 2.1.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype | None = None
    buffer: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def write(self, states: torch.Tensor, places: torch.Tensor) -> None:
        """Writes those of a block, `(B, l, N, E)`, to `places` `(l,)`."""
        if self.buffer is None:
            self.buffer = states.new_zeros(self.shape, dtype=self.dtype or states.dtype)
            if self.dtype == torch.int8:
                self.scales = states.new_zeros((*self.shape[:3], 1), dtype=torch.float32)
        if self.scales is not None:
            scales = states.abs().amax(dim=-1, keepdim=True).float() / INT8_MAX
            self.scales.index_copy_(1, places, scales)
            states = (states / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
        self.buffer.index_copy_(1, places, states.to(self.buffer.dtype))

    def read(self, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """The first tokens, `(B, num_tokens, N, E)`."""
        states = self.buffer[:, :num_tokens]
        if self.scales is not None:
            states = states * self.scales[:, :num_tokens]
        return states.to(dtype)

    @property
    def num_bytes(self) -> int:
        """Of the buffers, as far as they are made."""
        return sum(kept.nbytes for kept in (self.buffer, self.scales) if kept is not None)


@dataclass
class LayerCache:
    """What one layer remembers.

    Attributes:
        keys, values: Of the frames, the keys after rope.
        text: Keys and values of the prompt in cross-attention, `(B, S, N, E)` each; None until they are computed.
    """

    keys: KeptStates
    values: KeptStates
    text: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor, num_held: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a block's keys and values `(B, l, N, E)` to `places` `(l,)`; returns all that the block may see."""
        self.keys.write(key.type_as(value), places)  # under autocast norms may give float32, which attention casts
        self.values.write(value, places)
        return self.keys.read(num_held, key.dtype), self.values.read(num_held, value.dtype)


class KVCache:
    """Keys and values of a rollout, in buffers that are made once and neither grow nor move.

    Frames enter block by block with `reserve`; a block may be written any number of times until the next one starts.
    The first `sink_size` frames of the clip have places of their own. The others share the rest in turn: a frame is
    written over the oldest one when there is no free place. So the cache holds at most `capacity` frames: the sink,
    and the most recent ones, the current block included. Attention does not mind that they are out of order, since
    their positions are in the keys already.

    Attributes:
        layers: The memory of each layer.
        device: Where blocks come from.
        capacity: Latent frames that it can hold.
        num_frames: Latent frames of the clip seen so far, those that left the cache included.
        places: Tokens of the buffers that the current block is written to, `(l,)`.

    Source: Self Forcing, arXiv 2506.08009, section 3.4 (rolling cache); StreamingLLM, arXiv 2309.17453 (sink).
    """

    def __init__(
        self, layers: list[LayerCache], *, frame_tokens: int, sink_size: int, device: torch.device | None = None
    ) -> None:
        self.layers, self.frame_tokens, self.sink_size, self.device = layers, frame_tokens, sink_size, device
        self.capacity = layers[0].keys.shape[1] // frame_tokens
        self.num_frames = 0
        self._num_left_out = 0  # frames between the sink and those that came after a `restart`
        self.places = torch.empty(0, dtype=torch.int64)
        self._block = (0, 0)  # first frame and length of the current block
        self._prompt: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What the keys and values take, once the first block is written."""
        return sum(layer.keys.num_bytes + layer.values.num_bytes for layer in self.layers)

    @property
    def num_held(self) -> int:
        """Tokens of the buffers that are in use, always the first ones."""
        return min(self.num_frames - self._num_left_out, self.capacity) * self.frame_tokens

    def is_kept(self, start_frame: int, num_frames: int, end: int) -> bool:
        """Whether frames of a block are among those that the cache holds of a clip of `end` frames."""
        return start_frame < self.sink_size or start_frame + num_frames > end - (self.capacity - self.sink_size)

    def restart(self) -> None:
        """Forgets all frames, so that they may be written anew from the first on; the buffers stay."""
        self.num_frames, self._num_left_out, self._block = 0, 0, (0, 0)

    def leave_out(self, num_frames: int) -> None:
        """Has the next block begin so many frames later, as if those between had left the cache already."""
        self.num_frames += num_frames
        self._num_left_out += num_frames

    def reserve(self, start_frame: int, num_frames: int) -> None:
        """Makes room for a block.

        Args:
            start_frame: The block's first latent frame in the whole clip: either just after the frames seen so far,
                or that of the current block, which is then overwritten.
            num_frames: Latent frames in the block.

        Raises:
            ValueError: If the block neither continues nor repeats, or is longer than the cache.
        """
        if (start_frame, num_frames) == self._block and num_frames > 0:
            return
        if start_frame != self.num_frames:
            raise ValueError(
                f"a block must begin at latent frame {self.num_frames} (the next) or repeat the current one "
                f"{self._block}, got start_frame={start_frame}; run the blocks in order, or make a new cache."
            )
        if self.sink_size + num_frames > self.capacity:
            raise ValueError(
                f"the cache must hold the sink and one block, {self.sink_size} + {num_frames} latent frames, but has "
                f"room for {self.capacity}; raise local_attn_size or num_frames of make_cache."
            )
        self._block = (start_frame, num_frames)
        self.num_frames = start_frame + num_frames
        frames = torch.arange(start_frame, self.num_frames)
        in_turn = self.sink_size + (frames - self._num_left_out - self.sink_size) % (self.capacity - self.sink_size)
        frame_places = torch.where(frames < self.sink_size, frames, in_turn)
        tokens = frame_places[:, None] * self.frame_tokens + torch.arange(self.frame_tokens)
        self.places = to_device(tokens.flatten(), self.device or tokens.device)

    def keep_prompt(self, encoder_hidden_states: torch.Tensor) -> bool:
        """Forgets the keys and values of the prompt, unless it is the very tensor of the call before.

        Returns:
            Whether they are still there, so that the prompt need not be embedded again.
        """
        if self._prompt is not encoder_hidden_states:
            self._prompt = encoder_hidden_states
            for layer in self.layers:
                layer.text = None
        return all(layer.text is not None for layer in self.layers)
