"""The file of reference log-probabilities, damaged."""

import numpy as np

from danube_jax.training import reference_cache


def test_a_damaged_file_is_whole_or_made_again(tmp_path):
    path = tmp_path / reference_cache.FILE
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(path, train=values, **{reference_cache._FINGERPRINT: np.array("abc")})
    whole = path.read_bytes()
    assert reference_cache._read(path, "abd") is None
    rng = np.random.default_rng(0)
    outcomes = []
    for i in range(400):
        damaged = bytearray(whole)
        if i % 4:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        else:
            del damaged[rng.integers(len(whole)) :]
        path.write_bytes(damaged)
        arrays = reference_cache._read(path, "abc")
        outcomes.append(arrays is not None)
        if arrays is not None:
            np.testing.assert_array_equal(arrays["train"], values)
    assert 0 < sum(outcomes) < 200
