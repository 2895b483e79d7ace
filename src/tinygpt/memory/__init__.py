"""What a training step needs, found before anything is allocated, and what to choose for the memory there is."""

from tinygpt.memory._available import available_memory as available_memory
from tinygpt.memory._estimate import TrainingMemory as TrainingMemory
from tinygpt.memory._estimate import training_memory as training_memory
from tinygpt.memory._plan import MemoryPlan as MemoryPlan
from tinygpt.memory._plan import plan_memory as plan_memory

__all__ = ["MemoryPlan", "TrainingMemory", "available_memory", "plan_memory", "training_memory"]
