"""What the terms of the page mean, and what it cannot say."""

from __future__ import annotations

from pretrain.energy.sustainability import LEAST_SPIKE, SETTLING, SPIKE, WINDOW
from pretrain.study.page import layout
from pretrain.study.page.sections.study import Study


def methods(study: Study) -> str:
    """Definitions with the constants of the code that they describe, and the limits."""
    definitions = {
        "Matched budget": "Every run has the same decoder, the same data in the same order for a seed, the same number "
        "of tokens and steps; only the output head, the learning rate and the seed differ.",
        "Learning rate": "Every head is trained at every rate with the first seed. The rate with the lowest mean of "
        "held-out bits/byte over its seeds so far gets the next one, until the best has them all; a rate with a run "
        "that diverged comes after those without. The seeds that chose are those that are reported. The edge mark says "
        "that a smaller or larger rate might have been better still.",
        "Exponent": "n of the probabilities d^-n / sum of d^-n; sqrt_dim: the square root of the width.",
        "Bits/byte": "Negative log likelihood of the held-out text in bits, over its bytes; it does not depend on the "
        "tokenizer. Lower is better.",
        "95% interval": "Of the mean, over seeds; the second interval of a difference is over held-out documents and "
        "says nothing about seeds.",
        "Better, worse, no difference": "The interval over seeds of the difference in bits/byte lies below 0, above 0, "
        "or includes 0; the last does not show that two heads are equal. No correction for comparing several heads.",
        "Tokens/s": "Median over a run's records but the first, and over seeds; beneath it, as a multiple of the "
        "baseline's.",
        "J/token": "Joules of training over its tokens, of the parts of the machine that every run measured.",
        "Prototypes": "They are taken as the head's distance sees them (of length 1 for cosine, for one), less their "
        "mean.",
        "PCA90": "The fewest principal components of the prototypes that hold 90% of their variance, mean over seeds; "
        "at most the width.",
        "PCA90 of what was learnt": "The same of the prototypes less what they were at the start, which is noise in "
        "all directions; beneath it, how much of the prototypes' variance still lies along their start.",
        "PCA90 of final states": "The same of the hidden states that are scored, on held-out text.",
        "Effective rank": "exp of the entropy of the singular values of the prototypes, taken as shares of their sum "
        "(Roy and Vetterli, 2007), mean over seeds.",
        "Gradient unrest": "Of the global gradient norm before clipping: the variance of its logarithm about the "
        f"median of the {WINDOW} steps around each, from {SETTLING:.0%} of the run after the warm-up on. Trends "
        "leave nothing.",
        "Gradient spikes": f"Steps with a norm above that median by more than {SPIKE:g} robust standard deviations of "
        f"its logarithm, and by a factor of e^{LEAST_SPIKE:g} or more.",
        "Loss spikes": f"Steps with a training loss above the median of the {WINDOW} steps around by more than "
        f"{SPIKE:g} robust standard deviations, and by {LEAST_SPIKE:g} nats or more.",
        "Diverged": "Runs whose outcome was divergence, of all runs that were started for that head.",
        "Token frequencies": "The unigram model: every token with its share of the training tokens, whatever came "
        "before it.",
    }
    limits = [
        "One model size, one data set and one machine: nothing here says how heads compare at other sizes.",
        "Curves, projections and lengths are of the first seed alone.",
        "Time depends on the machine and on how far each head's code was tuned for it.",
        "PCA90 and effective rank describe how prototypes lie, not whether a person understands them.",
        "A learning rate chosen on the held-out text that is also reported favours every head a little.",
    ]
    if not study.has_energy:
        limits.append(study.no_energy)
    return layout.methods(definitions, limits)
