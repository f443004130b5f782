"""Rules over log-probabilities: laws, and a float64 oracle."""

import math

import pytest
import torch

from eutectic import errors
from eutectic.ensemble._predictions import fit_weights, maximum, mixture, require_numbers, union_of, weigh

NAMES = ("first", "second", "third")


def predictions(seed=0, samples=50):
    """Log p ``[3, B, 4]`` of parties that know classes 0 1, 1 2 3, and 3."""
    union = union_of([("a", "b"), ("b", "c", "d"), ("d",)])
    generator = torch.Generator().manual_seed(seed)
    own = [torch.randn(samples, n, generator=generator).log_softmax(1) for n in (2, 3, 1)]
    return union, torch.stack([union.spread(k, log_p) for k, log_p in enumerate(own)])


def test_the_union_of_overlapping_and_disjoint_label_sets():
    union, log_p = predictions()
    assert union.classes == ("a", "b", "c", "d")
    assert union.places == ((0, 1), (1, 2, 3), (3,))
    assert union.known.tolist() == [[True, True, False, False], [False, True, True, True], [False, False, False, True]]
    assert torch.equal(log_p.exp() > 0, union.known[:, None].expand_as(log_p))
    torch.testing.assert_close(log_p.exp().sum(2), torch.ones(3, 50))
    assert union_of([("d",), ("c", "b", "d"), ("b", "a")]).classes == union.classes
    with pytest.raises(errors.TaskError, match="party 1: its classes are"):
        union_of([("a",), ()])
    with pytest.raises(errors.TaskError, match="each once"):
        union_of([("a", "a")])


def test_a_mixture_is_the_weighted_sum_and_stays_normalised():
    _, log_p = predictions()
    weights = torch.tensor([0.5, 0.2, 0.3])
    oracle = sum(w * p.double().exp() for w, p in zip(weights.double(), log_p, strict=True))
    torch.testing.assert_close(mixture(weights.log(), log_p).exp().double(), oracle, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mixture(weights.log(), log_p).logsumexp(1), torch.zeros(50), atol=1e-6, rtol=0)
    each = weights.log()[:, None].expand(-1, 50)
    assert torch.equal(mixture(each, log_p), mixture(weights.log(), log_p))
    assert torch.equal(maximum(log_p), log_p.max(0).values)


def test_a_single_party_is_its_own_classifier_and_two_halves_are_one():
    _, log_p = predictions()
    one = log_p[1:2]
    density = torch.randn(1, 50)
    torch.testing.assert_close(mixture(density, one).log_softmax(1), one[0])
    halves = mixture((density + math.log(0.5)).expand(2, -1), one.expand(2, -1, -1))
    torch.testing.assert_close(halves, mixture(density, one))


def test_what_is_predicted_does_not_depend_on_the_order_of_parties_or_on_the_unit_of_density():
    _, log_p = predictions()
    prior, density = torch.tensor([0.2, 0.3, 0.5]).log(), 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    whole = mixture(weigh(prior, density, NAMES), log_p).log_softmax(1)
    turned = [2, 0, 1]
    torch.testing.assert_close(mixture(weigh(prior[turned], density[turned], NAMES), log_p[turned]).log_softmax(1), whole)
    torch.testing.assert_close(mixture(weigh(prior, density + 7.0, NAMES), log_p).log_softmax(1), whole)


def test_disjoint_labels_and_equal_densities_leave_the_priors():
    union = union_of([("a",), ("b",)])
    log_p = torch.stack([union.spread(k, torch.zeros(5, 1)) for k in range(2)])
    prior = torch.tensor([0.25, 0.75])
    found = mixture(weigh(prior.log(), torch.full((2, 5), -123.0), NAMES[:2]), log_p).log_softmax(1).exp()
    torch.testing.assert_close(found, prior.expand(5, 2))


def test_differences_of_ten_thousand_nats_stay_finite():
    _, log_p = predictions()
    density = torch.tensor([-1e4, 0.0, 1e4])[:, None].expand(-1, 50)
    found = mixture(weigh(torch.zeros(3), density, NAMES), log_p).log_softmax(1)
    assert not found.isnan().any()
    assert (found.argmax(1) == 3).all()
    wide = mixture(weigh(torch.zeros(3), density.double(), NAMES), log_p.double()).log_softmax(1)
    torch.testing.assert_close(found.exp(), wide.exp().float())


def test_an_input_that_nobody_knows_is_judged_by_the_priors():
    prior = torch.tensor([0.2, 0.3, 0.5]).log()
    density = torch.tensor([[-torch.inf, -1.0], [-torch.inf, -torch.inf], [-torch.inf, 2.0]])
    found = weigh(prior, density, NAMES)
    assert torch.equal(found[:, 0], prior)
    assert torch.equal(found[:, 1], prior + density[:, 1])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(errors.NonFiniteError, match="party 'second': its log-density of 1 of 2 samples"):
            weigh(prior, torch.tensor([[0.0, 0.0], [0.0, bad], [0.0, 0.0]]), NAMES)


def test_predictions_that_are_no_numbers_name_their_party():
    _, log_p = predictions()
    require_numbers(log_p, NAMES)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = log_p.clone()
        broken[2, 4] = bad
        with pytest.raises(errors.NonFiniteError, match="party 'third': its predictions for 1 of 50"):
            require_numbers(broken, NAMES)


def test_fitted_weights_are_the_likeliest_and_find_those_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(3, 4000, 4, generator=generator).mul(2).log_softmax(2)
    weights = torch.tensor([0.6, 0.1, 0.3])
    party = torch.multinomial(weights, 4000, replacement=True, generator=generator)
    labels = torch.multinomial(log_p[party, torch.arange(4000)].exp(), 1, generator=generator).squeeze(1)
    found = fit_weights(log_p, labels)
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(found.exp(), weights, atol=0.05, rtol=0)

    def likelihood(log_w):
        return mixture(log_w, log_p.double()).gather(1, labels[:, None]).mean()

    for other in torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((20,)):
        assert likelihood(other.log()) <= likelihood(found.double()) + 1e-9


def test_a_label_that_every_party_rules_out_is_refused():
    _, log_p = predictions()
    log_p[:, 0, 2] = -torch.inf
    with pytest.raises(errors.TaskError, match="1 of 50 labelled examples have a label that every party rules out"):
        fit_weights(log_p, torch.full((50,), 2))
