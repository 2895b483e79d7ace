"""A whole run in plain values: a file names it, the run keeps it, and it repeats the run.

A recipe composes the public parts of the library and trains nothing itself; `tinygpt train` is a recipe and a folder.
"""

from tinygpt.recipe._build import RecipeRun as RecipeRun
from tinygpt.recipe._build import resolve_device as resolve_device
from tinygpt.recipe._plan import RunPlan as RunPlan
from tinygpt.recipe._recipe import Recipe as Recipe
from tinygpt.recipe._sections import DataRecipe as DataRecipe
from tinygpt.recipe._sections import OptimizerRecipe as OptimizerRecipe
from tinygpt.recipe._sections import PhaseRecipe as PhaseRecipe
from tinygpt.recipe._sections import PushRecipe as PushRecipe
from tinygpt.recipe._sections import SamplesRecipe as SamplesRecipe
from tinygpt.recipe._sections import ScheduleRecipe as ScheduleRecipe
from tinygpt.recipe._sections import SchedulesRecipe as SchedulesRecipe
from tinygpt.recipe._sections import TokenizerRecipe as TokenizerRecipe

__all__ = [
    "DataRecipe",
    "OptimizerRecipe",
    "PhaseRecipe",
    "PushRecipe",
    "Recipe",
    "RecipeRun",
    "RunPlan",
    "SamplesRecipe",
    "ScheduleRecipe",
    "SchedulesRecipe",
    "TokenizerRecipe",
    "resolve_device",
]
