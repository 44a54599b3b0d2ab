"""The three networks of distillation, in one module: generator, fake score and real score.

By default they are one network: the generator and the fake score are LoRAs of it (adapters of PEFT), and the real
score is the network without either. So the weights are in memory once, also in 4 bits. They may be networks of their
own: where all weights are trained, or the teacher is another model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from longlive_diffusers import LongLiveTransformer3DModel


class Role(StrEnum):
    """What a network is used as."""

    GENERATOR = "generator"
    FAKE_SCORE = "fake_score"
    REAL_SCORE = "real_score"


class DistillationNetworks(nn.Module):
    """
    Args:
        networks: The network of each role; the same object where roles share one.
        adapters: The adapter of a role; without one, a role uses its network as it is.

    Raises:
        ValueError: If two roles would be the same network with the same adapter.
    """

    _no_split_modules = ["LongLiveTransformerBlock"]  # what FSDP gathers at a time

    def __init__(self, networks: Mapping[Role, LongLiveTransformer3DModel], adapters: Mapping[Role, str]):
        super().__init__()
        used = [(id(networks[role]), adapters.get(role)) for role in Role]
        if len(set(used)) < len(used):
            raise ValueError("Two roles are the same network with the same adapter, so that they could not differ")
        owners = {id(network): role for role, network in reversed(networks.items())}
        self._owner = {role: owners[id(networks[role])].value for role in Role}
        self.networks = nn.ModuleDict({name: networks[Role(name)] for name in dict.fromkeys(self._owner.values())})
        self._adapters = dict(adapters)
        self._trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def network(self, role: Role) -> LongLiveTransformer3DModel:
        """Return the network of a role, for its configuration; call it through [`using`]."""
        network = self.networks[self._owner[role]]
        assert isinstance(network, LongLiveTransformer3DModel)
        return network

    def adapter(self, role: Role) -> str | None:
        """Return the name of the adapter of a role, if it is one."""
        return self._adapters.get(role)

    def parameters_of(self, role: Role) -> dict[str, nn.Parameter]:
        """Return the trained parameters of a role, by their names in its network."""
        adapter = self.adapter(role)
        return {
            name: parameter
            for name, parameter in self.network(role).named_parameters()
            if parameter.requires_grad and (adapter is None or f".{adapter}." in name)
        }

    @contextmanager
    def using(self, role: Role) -> Iterator[Any]:
        """
        Let the shared network be that of a role, in forwards and in backwards (which compute parts of the forward
        again, with gradient checkpointing).

        Yields:
            What to call like the role's network.
        """
        self._switch(role)
        yield partial(self, role)

    def forward(self, role: Role, *args, **kwargs) -> Any:
        """Run the network of a role. It runs inside of this module because FSDP gathers weights where it is called."""
        return self.networks[self._owner[role]](*args, **kwargs)

    def _switch(self, role: Role) -> None:
        adapter = self.adapter(role)
        for module in self.network(role).modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(adapter is not None)
                if adapter is not None:
                    module.set_adapter(adapter)
        # PEFT freezes the adapters that are not in use. What trains is decided by the optimizers here, and FSDP
        # remembers from its first forward what did.
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trained)
