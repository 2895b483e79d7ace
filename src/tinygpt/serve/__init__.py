"""A model behind HTTP: OpenAI's API for programs, and a page to chat for people. Needs `tinygpt[serve]`."""

from tinygpt.serve._config import ServerConfig as ServerConfig
from tinygpt.serve._serve import create_app as create_app
from tinygpt.serve._serve import serve as serve

__all__ = ["ServerConfig", "create_app", "serve"]
