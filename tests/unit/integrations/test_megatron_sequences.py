"""Every context-parallel rank names the sequence of a token alike."""

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core.packed_seq_params import PackedSeqParams

from semantic_ep.integrations.megatron.sequences import sequences_of_batch


@dataclasses.dataclass(frozen=True)
class Group:
    """Stands for a process group that only says its shape."""

    ranks: int
    number: int

    def size(self):
        return self.ranks

    def rank(self):
        return self.number


def zigzag(values, rank, ranks):
    """The part of `values` [..., S] that Megatron gives to a context-parallel rank."""
    chunks = values.chunk(2 * ranks, dim=-1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=-1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_packed_rows_are_told_apart_by_their_positions(ranks):
    lengths = [[5, 11], [16], [1, 2, 13]]
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    truth = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    ) + 10 * torch.arange(3).unsqueeze(1)
    names = {}
    for rank in range(ranks):
        part = zigzag(position, rank, ranks)
        found = sequences_of_batch(
            torch.zeros_like(part),
            position_ids=part,
            packed_seq_params=None,
            context_parallel=Group(ranks, rank),
        )
        mine = zigzag(truth, rank, ranks)
        for name, true in zip(found.flatten().tolist(), mine.flatten().tolist(), strict=True):
            assert names.setdefault(true, name) == name
    assert len(set(names.values())) == 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_sequences_of_thd_batches_are_told_apart_by_their_bounds(ranks):
    bounds = torch.tensor([0, 4, 12, 16], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_q_padded=None)
    for rank in range(ranks):
        found = sequences_of_batch(
            torch.zeros(1, 16 // ranks),
            position_ids=None,
            packed_seq_params=packed,
            context_parallel=Group(ranks, rank),
        )
        expected = torch.arange(3).repeat_interleave(torch.tensor([4, 8, 4]) // ranks)
        assert found.tolist() == [expected.tolist()]
