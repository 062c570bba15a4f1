"""The public names, and where each of them is defined."""

from .adapters.fuse import fuse as fuse
from .adapters.lora import LoRA as LoRA
from .checkpoint.convert import Converted as Converted
from .checkpoint.convert import convert as convert
from .diffusion.conversation import Conversation as Conversation
from .diffusion.engine import Engine as Engine
from .diffusion.events import Commit as Commit
from .diffusion.events import Event as Event
from .diffusion.events import Prefilled as Prefilled
from .diffusion.events import Step as Step
from .diffusion.generation import GenerateOptions as GenerateOptions
from .diffusion.generation import ImageSource as ImageSource
from .diffusion.generation import generate as generate
from .diffusion.generation import stream_generate as stream_generate
from .diffusion.prefix import Prefix as Prefix
from .errors import DGemmaError as DGemmaError
from .evaluation import Result as Result
from .evaluation import Row as Row
from .evaluation import evaluate as evaluate
from .loading import load as load
from .model.cache import PrefixCache as PrefixCache
from .model.language import DiffusionGemma as DiffusionGemma
from .settings import Settings as Settings
from .settings import SettingsOverrides as SettingsOverrides
from .text.chat import Prompt as Prompt
from .text.replies import Answer as Answer
from .text.replies import Call as Call
from .text.replies import Malformed as Malformed
from .text.replies import Part as Part
from .text.replies import Thought as Thought
from .text.tokenizer import Tokenizer as Tokenizer
from .training.finetune import train as train
from .training.record import Validated as Validated
from .training.settings import TrainSettings as TrainSettings

__version__: str
