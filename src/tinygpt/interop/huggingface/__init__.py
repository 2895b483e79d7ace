"""Into transformers and back: folders that `AutoModelForCausalLM` loads, and checkpoints of transformers in our parts.

Export maps a model onto a class of transformers where one computes exactly the same, and else writes one file of code
along. Import reads the Llama family and what export wrote. Both only write and read files; neither needs transformers.
"""

from tinygpt.interop.huggingface._export import export as export
from tinygpt.interop.huggingface._load import Imported as Imported
from tinygpt.interop.huggingface._load import from_transformers as from_transformers
from tinygpt.interop.huggingface._load import llama_mlp as llama_mlp
from tinygpt.interop.huggingface._stock import StockMatch as StockMatch
from tinygpt.interop.huggingface._stock import stock_architecture as stock_architecture

__all__ = ["Imported", "StockMatch", "export", "from_transformers", "llama_mlp", "stock_architecture"]
