"""What goes through a model's decoder: token ids, and for a vision-language model what its tower makes of pictures.

A decoder is fed either ids alone, or embeddings in which placeholders are replaced by the tower's features, with
rotary positions of three axes. Which feature a placeholder stands for follows from the key of its picture and its
place within it, and the positions are the model's own function of the whole row, so that rows may be padded, cut at
their openings or laid end to end afterwards: a `Sight` is laid out as the ids are.

The tower runs once per picture and micro-batch, whatever the number of rows that show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agents.critic import decoder_of, trunk_of


@dataclass(frozen=True)
class Features:
    """What a tower makes of some pictures, one after the other: M features."""

    embed_MH: Tensor
    """In the place of the placeholders' embeddings."""
    deep: tuple[Tensor, ...]
    """Added to the hidden states after the first layers, one `[M, H]` each; () for models that do not."""
    start: Mapping[int, int]
    """First feature of each picture, by key."""


def see(trunk: Any, pictures: Mapping[int, tuple[Tensor, Tensor]]) -> Features:
    """Run the tower over pictures: key -> (patches `[P, D]`, grid `[3]`)."""
    device = next(trunk.parameters()).device
    patches = torch.cat([patches_PD for patches_PD, _ in pictures.values()]).to(device)
    grid_N3 = torch.stack([grid_3 for _, grid_3 in pictures.values()]).to(device)
    out = trunk.get_image_features(pixel_values=patches, image_grid_thw=grid_N3, return_dict=True)
    found = list(out.pooler_output)
    start, at = {}, 0
    for key, features in zip(pictures, found, strict=True):
        start[key] = at
        at += len(features)
    deep = getattr(out, "deepstack_features", None) or ()
    return Features(torch.cat(found), tuple(torch.cat(list(layer)) for layer in deep), start)


def embedded(trunk: Any, ids_RS: Tensor, shown_RS: Tensor, feature_RS: Tensor, seen: Features | None) -> dict[str, Any]:
    """A decoder's arguments: embeddings of ids, and where shown_RS is True the features that feature_RS numbers."""
    embed_RSH = trunk.get_input_embeddings()(ids_RS)
    if seen is None:
        return {"inputs_embeds": embed_RSH}
    index_N = feature_RS[shown_RS]
    fed: dict[str, Any] = {
        "inputs_embeds": embed_RSH.masked_scatter(shown_RS[..., None], seen.embed_MH[index_N].to(embed_RSH.dtype))
    }
    if seen.deep:
        fed["visual_pos_masks"] = shown_RS
        fed["deepstack_visual_embeds"] = [layer_MH[index_N] for layer_MH in seen.deep]
    return fed


def positions(model: Any, ids_T: Tensor, shown_T: Tensor, grids: Sequence[Tensor]) -> Tensor:
    """Rotary positions `[3, T]` of one whole row, by the model's own function."""
    if not len(grids):
        return torch.arange(len(ids_T)).expand(3, -1)
    place_31T, _ = trunk_of(model).get_rope_index(
        ids_T[None], mm_token_type_ids=shown_T[None].int(), image_grid_thw=torch.stack(list(grids))
    )
    return place_31T[:, 0]


@dataclass(frozen=True)
class Sight:
    """What some tokens show and where they stand; laid out as their ids are."""

    picture_RS: Tensor
    """Key of the picture that a placeholder stands for, 0 elsewhere."""
    offset_RS: Tensor
    """Which of its picture's features a placeholder stands for."""
    place_3RS: Tensor
    """Rotary positions."""
    media: Mapping[str, Tensor]
    """`Batch.media`."""
    always: bool = False
    """Run the tower also for tokens that show nothing: over a picture that nobody looks at, with a gradient of zero.
    Where models are split over processes, all of them make the same passes."""

    @classmethod
    def of(
        cls, model: Any, ids_RT: Tensor, picture_RT: Tensor, media: Mapping[str, Tensor], always: bool = False
    ) -> Sight:
        """Of whole rows, padded on the right."""
        picture_RT, ids_RT = picture_RT.cpu(), ids_RT.cpu()
        shown_RT = picture_RT != 0
        time_T = torch.arange(picture_RT.shape[1])
        begin_RT = shown_RT & ~torch.nn.functional.pad(shown_RT, (1, 0))[:, :-1]  # pictures never touch
        first_RT = torch.where(begin_RT, time_T, 0).cummax(1).values
        places = [
            positions(model, ids_T, shown_T, [media[f"{key}.grid"].cpu() for key in key_T[begin_T].tolist()])
            for ids_T, shown_T, key_T, begin_T in zip(ids_RT, shown_RT, picture_RT, begin_RT, strict=True)
        ]
        return cls(picture_RT, torch.where(shown_RT, time_T - first_RT, 0), torch.stack(places, 1), media, always)

    def laid(self, how: Callable[[Tensor], Tensor]) -> Sight:
        """The same tokens laid out otherwise; `how` takes one number per token."""
        places = torch.stack([how(place_RT) for place_RT in self.place_3RS])
        return replace(self, picture_RS=how(self.picture_RS), offset_RS=how(self.offset_RS), place_3RS=places)

    def to(self, device: torch.device) -> Sight:
        """The same on another device."""
        return self.laid(lambda x: x.to(device))

    def fed(self, trunk: Any, ids_RS: Tensor) -> dict[str, Any]:
        """A decoder's arguments, rotary positions included."""
        keys = self.picture_RS[self.picture_RS != 0].unique().tolist()
        if self.always and not keys:
            keys = [min((len(t), int(name)) for name, t in self.media.items() if name.isdigit())[1]]
        seen, feature_RS = None, self.offset_RS
        if keys:
            seen = see(trunk, {key: (self.media[str(key)], self.media[f"{key}.grid"]) for key in keys})
            for key, start in seen.start.items():
                feature_RS = torch.where(self.picture_RS == key, self.offset_RS + start, feature_RS)
        fed = embedded(trunk, ids_RS, self.picture_RS != 0, feature_RS, seen)
        return {**fed, "position_ids": self.place_3RS}


def feed(model: Any, ids_RS: Tensor, sight: Sight | None, **more: Any) -> Any:
    """Run a model's decoder over tokens; `more` are its further arguments. Returns what it returns.

    Positions in `more` are those of text; where there is a sight, its own are taken.
    """
    decoder = decoder_of(model)
    if sight is None:
        return decoder(input_ids=ids_RS, **more)
    return decoder(**{**more, **sight.fed(trunk_of(model), ids_RS)})
