# What longctx imports from transformers, for pyright. With transformers' own __init__ it reads the modules of all model
# families, 2,700 files, to learn no more: each of these names is used as Any.
from typing import Any

AttentionInterface: Any
AutoConfig: Any
AutoModelForCausalLM: Any
AutoTokenizer: Any
CONFIG_MAPPING: Any
GenerationConfig: Any
PreTrainedModel: Any
PreTrainedTokenizerFast: Any
