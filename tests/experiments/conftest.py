from tests.programs import single_thread  # noqa: F401, a fixture
