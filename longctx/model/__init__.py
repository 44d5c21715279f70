"""The model of a run: loading it, its exact loss in little memory, its rotary embedding, and writing it out."""

from longctx.model.load import init_from, load, model_of
from longctx.model.rotary import set_rope
from longctx.model.wrapper import LossModel, LossOutput

__all__ = ["LossModel", "LossOutput", "init_from", "load", "model_of", "set_rope"]
