"""What PyTorch says of the machine is no fault of a test."""


def pytest_configure(config):
    # A loader with two workers is told so on a machine of one core.
    config.addinivalue_line("filterwarnings", "ignore:This DataLoader will create:UserWarning")
