"""The modules of one model while adapters are attached: hosts in the places of linear maps, swaps of whole modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from deltaw.core.bottleneck import Bottleneck
from deltaw.core.site import BlockSite, VirtualSite
from deltaw.core.spec import Form
from deltaw.model.attachment import Attachment
from deltaw.model.host import EmbeddingHost, Host, Rows, Run, Slot
from deltaw.model.places import Places
from deltaw.model.swap import Swapped


class Installed:
    """What stands in the base's places; taking out the last adapter of a place puts the base's own module back."""

    def __init__(self, places: Places, run: Run, base_tensors: Mapping[str, Tensor]) -> None:
        self.places = places
        self.run = run
        self._base_tensors = base_tensors
        self._hosts: dict[str, Host] = {}
        self._swaps: dict[str, Swapped] = {}

    @property
    def is_bare(self) -> bool:
        """Whether every module is the base's own."""
        return not self._hosts and not self._swaps

    def install(self, name: str, made: Attachment, forms: Mapping[str, Form] | None = None) -> None:
        """Put one adapter's changes into their places. forms: its normal forms, where they are made and stay."""
        forms = forms or {}
        for site_name in made.sites:
            site = made.places[site_name]
            if isinstance(site, VirtualSite):
                continue
            self._host(site.name).slots[name] = Slot(made.spec, made.at(site.name), site, form=forms.get(site.name))
            if isinstance(site, BlockSite):
                self._listen(name, site, made)
        for tensor, value in made.swaps.items():
            owner, _, key = tensor.rpartition(".")
            self._swapped(owner).values.setdefault(name, {})[key] = value
        self.install_rows(name, made)

    def _listen(self, name: str, site: BlockSite, made: Attachment) -> None:
        """Keep the input of a block's half where the bottleneck behind it reads that."""
        form = made.lowered(site.name, self.places)
        if isinstance(form, Bottleneck) and form.parallel:
            entry = self.places.sites[site.entry]
            self._host(site.entry).slots[name] = Slot(made.spec, {}, entry, heard=site.name)

    def install_rows(self, name: str, made: Attachment) -> None:
        """Put its swapped or added rows into theirs."""
        for tensor, (ids, value) in made.rows.items():
            owners = [n for n, t in self._base_tensors.items() if t is self._base_tensors[tensor]]
            for owner in {tensor, *(o for o in owners if o not in made.rows)}:
                site = owner.rpartition(".")[0]
                slot = self._host(site).slots.setdefault(name, Slot(made.spec, {}, self.places.sites[site]))
                slot.rows = Rows(ids, value)

    def _host(self, site_name: str) -> Host:
        if site_name not in self._hosts:
            site = self.places.sites[site_name]
            kind = EmbeddingHost if site.kind == "embedding" else Host
            inner = self._swaps.get(site_name, self.places.modules[site_name])
            number = list(self.places.sites).index(site_name)
            host = kind(site, inner, self.places.weights[site_name], self.run, number)
            self._hosts[site_name] = host
            self._put(site_name, host)
        return self._hosts[site_name]

    def _swapped(self, owner: str) -> Swapped:
        if owner not in self._swaps:
            self._swaps[owner] = Swapped(self.places.modules[owner], self.run)
            self._put_inner(owner, self._swaps[owner])
        return self._swaps[owner]

    def _put_inner(self, path: str, module: nn.Module) -> None:
        if path in self._hosts:
            self._hosts[path].original = module
        else:
            self._put(path, module)

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self.places.modules[parent], child, module)

    def remove(self, name: str) -> None:
        """Take one adapter out of every place."""
        for site, host in list(self._hosts.items()):
            host.slots.pop(name, None)
            if not host.slots:
                self._put(site, host.original)
                del self._hosts[site]
        for owner, swapped in list(self._swaps.items()):
            swapped.values.pop(name, None)
            if not swapped.values:
                self._put_inner(owner, swapped.original)
                del self._swaps[owner]
