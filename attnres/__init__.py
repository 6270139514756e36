"""Block Attention Residuals (Block AttnRes) Qwen3 models. Importing registers the transformers Auto classes."""

from attnres.requirements import check_transformers

check_transformers()  # before the imports that another release would fail in

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attnres.baseline import recency_schedule, wrap_qwen3
from attnres.configuration_attnres import AttnResConfig
from attnres.modeling_attnres import AttnResForCausalLM, AttnResModel
from attnres.routing import DepthState, Intervention, Read
from attnres.sites import FAMILIES, REGIONS, SUBLAYERS, Family, ReadSite, Sublayer, read_sites

AutoConfig.register(AttnResConfig.model_type, AttnResConfig)
AutoModel.register(AttnResConfig, AttnResModel)
AutoModelForCausalLM.register(AttnResConfig, AttnResForCausalLM)

__version__ = "0.1.0"

__all__ = [
    "FAMILIES",
    "REGIONS",
    "SUBLAYERS",
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResModel",
    "DepthState",
    "Family",
    "Intervention",
    "Read",
    "ReadSite",
    "Sublayer",
    "read_sites",
    "recency_schedule",
    "wrap_qwen3",
]
