"""Files to and from the Hugging Face Hub: folders in, folders out, no model and no tensor.

`huggingface_hub` is imported when a function needs it, so a local folder costs nothing. Where the client looks and
who it is come from its own settings (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`); nothing here reads or changes them.
"""

from tinygpt.hub._download import resolve as resolve
from tinygpt.hub._names import MODEL_FILES as MODEL_FILES
from tinygpt.hub._names import check_repo_id as check_repo_id
from tinygpt.hub._names import check_tags as check_tags
from tinygpt.hub._retry import PassingHubError as PassingHubError
from tinygpt.hub._upload import upload_folder as upload_folder

__all__ = ["MODEL_FILES", "PassingHubError", "check_repo_id", "check_tags", "resolve", "upload_folder"]
