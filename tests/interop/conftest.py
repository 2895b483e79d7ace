"""Where transformers keeps the code that comes with a model: not in the home of whoever runs the tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def code_of_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    import transformers.dynamic_module_utils as code

    code.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
