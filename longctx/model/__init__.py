"""The model of a run: loading it, its exact loss in little memory, its rotary embedding, writing it out."""

from longctx.model.export import export
from longctx.model.load import init_from, load, model_of
from longctx.model.rotary import set_rope
from longctx.model.wrapper import LossModel, LossOutput

__all__ = ["LossModel", "LossOutput", "export", "init_from", "load", "model_of", "set_rope"]
