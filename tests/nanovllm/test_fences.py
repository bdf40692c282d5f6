"""Requests whose blocks are wanted again while work on another stream still reads them."""

from __future__ import annotations

from decoders import generated, greedy, loaded, prompts, text
from hand_fence import HandFence
from serving import serving


def test_blocks_that_are_still_read_go_to_nobody_else() -> None:
    of = loaded("llama")
    with serving(of, num_blocks=12, block_size=4, prefix_caching=False) as runtime:
        [table] = runtime.tables
        first = runtime.add(greedy(text(15), 8))
        runtime.step()
        read = set(table.row_blocks(first.row))
        fence = HandFence()
        table.fence_of = lambda row: fence
        runtime.run()
        table.fence_of = lambda row: None
        assert table.pool.held >= len(read)
        second = runtime.add(greedy(text(15, seed=1), 8))
        while runtime.unfinished:
            runtime.step()
            assert not read & set(table.row_blocks(second.row))
        assert fence.waits == 0
        fence.let_pass()
        assert table.pool.free == 12
    assert first.output == generated(of, text(15), 8)
    assert second.output == generated(of, text(15, seed=1), 8)


def test_who_needs_such_blocks_waits_and_nobody_is_preempted_or_fails() -> None:
    of = loaded("llama")
    with serving(of, num_blocks=8, block_size=4, prefix_caching=False) as runtime:
        [table] = runtime.tables
        fences: list[HandFence] = []

        def fence_of(row: int) -> HandFence:
            fences.append(HandFence())
            return fences[-1]

        table.fence_of = fence_of
        given = prompts((15, 9, 22, 4, 17))
        requests = []
        for prompt in given:
            requests += runtime.run([greedy(prompt, 8)])
        assert sum(fence.waits for fence in fences) > 0
        assert runtime.counters.preemptions == 0
        for fence in fences:
            fence.let_pass()
    assert [request.output for request in requests] == [generated(of, prompt, 8) for prompt in given]


def test_a_preempted_request_frees_its_blocks_when_they_are_no_longer_read() -> None:
    of = loaded("llama")
    given = prompts((21, 17, 30, 12))
    with serving(of, num_blocks=16, block_size=4) as runtime:
        [table] = runtime.tables
        fences: list[HandFence] = []

        def fence_of(row: int) -> HandFence:
            fences.append(HandFence())
            return fences[-1]

        table.fence_of = fence_of
        requests = runtime.run([greedy(prompt, 20) for prompt in given])
        assert runtime.counters.preemptions > 0
        assert sum(fence.waits for fence in fences) > 0
        for fence in fences:
            fence.let_pass()
    assert [request.output for request in requests] == [generated(of, prompt, 20) for prompt in given]
