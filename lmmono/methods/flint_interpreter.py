"""FLINT's interpreter on text: attributes of tokens, their pooling, a linear head and a decoder.

    acts of the chosen hooks -> LN each, concat -> Linear -> GELU -> Linear -> ReLU   Psi
        a [batch, pos, attribute]  -> pooled  phi [batch, attribute]                  pool
        phi -> phi @ W [batch, c], no bias: contributions add up to the score         h
        phi -> words of the text, or its embedding; a -> tokens                       d

Attributes are made per token and pooled after, as "Listen to Interpret" (arXiv 2202.11479) does, so
that each has an act on each token. In a causal model an act sees the text up to its token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lmmono.methods import flint_losses as losses
from lmmono.methods.flint_words import ContentWords, count_words
from lmmono.probes.finetuning import pooled_tokens
from lmmono.recipe.objective_settings import AttributePooling, FlintDecoder, FlintHead

LSE_SHARPNESS = 5.0
"""kappa of lse pooling: 0 would be the mean, infinity the maximum."""


@dataclass(frozen=True, slots=True, eq=False)
class AttributeReading:
    """What an interpreter makes of a batch."""

    tokens: Float[Tensor, "batch pos attribute"]
    """a: the act of each attribute on each token, 0 where a token does not count."""
    phi: Float[Tensor, "batch attribute"]
    """The attributes of each text."""
    scores: Float[Tensor, "batch c"]
    """phi @ W: logits of the interpreter."""


class Interpreter(nn.Module):
    """Psi, pooling, h and d.

    Attributes:
        hook_attributes: The last step of Psi, whose output is a hook like any other.
    """

    def __init__(
        self,
        widths: Sequence[int],
        n_attributes: int,
        n_classes: int,
        *,
        d_hidden: int,
        pooling: AttributePooling,
        head: FlintHead,
        dropout: float,
        decoder: FlintDecoder,
        words: ContentWords | None,
        embedding: Float[Tensor, "d_vocab d_embed"],
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        last = nn.Linear(d_hidden, n_attributes)
        # entropies have no gradient to speak of below activations of about 1
        nn.init.normal_(last.weight, std=2.0 * d_hidden**-0.5)
        nn.init.constant_(last.bias, 0.5)
        self.psi = nn.Sequential(nn.Linear(sum(widths), d_hidden), nn.GELU(), last)
        self.hook_attributes = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.raw_head = nn.Parameter(torch.randn(n_attributes, n_classes))
        self._pooling, self._head, self._decoder = pooling, head, decoder
        if pooling == "attn":
            self.gate = nn.ModuleList(
                nn.Linear(n_attributes, n_attributes, bias=False) for _ in range(2)
            )
            self.gate_out = nn.Linear(n_attributes, 1, bias=False)
        self._add_decoder(n_attributes, words, embedding.detach())

    def _add_decoder(
        self, n_attributes: int, words: ContentWords | None, embedding: Tensor
    ) -> None:
        d_vocab, d_embed = embedding.shape
        if self._decoder == "token":
            self.decoder = nn.Linear(n_attributes, d_embed, bias=False)
            return
        assert words is not None, "bow and embed count words"
        ids = torch.from_numpy(words.token_ids)
        column = torch.full((d_vocab,), len(words))
        column[ids] = torch.arange(len(words))
        self.word_ids: Tensor
        self.word_column: Tensor
        self.register_buffer("word_ids", ids)
        self.register_buffer("word_column", column)
        if self._decoder == "bow":
            self.log_frequency: Tensor
            self.register_buffer("log_frequency", torch.from_numpy(words.log_frequency))
            self.decoder = nn.Linear(n_attributes, len(words), bias=False)
            nn.init.normal_(self.decoder.weight, std=0.01)  # begins at the unigram model
        else:
            weighted = torch.from_numpy(words.idf)[:, None] * embedding.cpu()[ids].float()
            self.word_vectors: Tensor
            self.idf: Tensor
            self.register_buffer("word_vectors", weighted)  # as they were before any training
            self.register_buffer("idf", torch.from_numpy(words.idf))
            self.decoder = nn.Linear(n_attributes, d_embed)

    @property
    def weight(self) -> Float[Tensor, "attribute c"]:
        """W of the head; not negative with head nonneg."""
        return F.softplus(self.raw_head) if self._head == "nonneg" else self.raw_head

    @property
    def decoder_words(self) -> Float[Tensor, "word attribute"]:
        """W_d: what each attribute adds to the logit of each word of `word_ids`; bow only."""
        assert self._decoder == "bow"
        return self.decoder.weight

    def attributes(self, acts: Sequence[Tensor]) -> Float[Tensor, "batch pos attribute"]:
        """Return the attributes of every token, padding included."""
        normed = [norm(x.flatten(2).float()) for norm, x in zip(self.norms, acts, strict=True)]
        return self.hook_attributes(self.psi(torch.cat(normed, -1)))

    def forward(self, acts: Sequence[Tensor], used: Bool[Tensor, "batch pos"]) -> AttributeReading:
        """Read a batch.

        Args:
            acts: Of each hook, [batch, pos, width] or with heads.
            used: Tokens that count; every text has one at least.
        """
        tokens = self.attributes(acts) * used[..., None]
        phi = self.pool(tokens, used)
        return AttributeReading(tokens, phi, self.dropout(phi) @ self.weight)

    def pool(
        self, tokens: Float[Tensor, "batch pos attribute"], used: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch attribute"]:
        """Return one value per text and attribute; acts of tokens that do not count are 0."""
        n_used = used.sum(1, keepdim=True)
        match self._pooling:
            case "mean":
                return tokens.sum(1) / n_used
            case "max":
                return tokens.amax(1)
            case "last":
                place = torch.arange(used.shape[1], device=used.device)
                last = torch.where(used, place, 0).amax(1)
                return tokens[torch.arange(len(tokens), device=used.device), last]
            case "lse":
                scaled = (LSE_SHARPNESS * tokens).masked_fill(~used[..., None], -torch.inf)
                return (scaled.logsumexp(1) - n_used.log()) / LSE_SHARPNESS
            case _:  # attn
                value, gate = self.gate
                score = self.gate_out(torch.tanh(value(tokens)) * torch.relu(gate(tokens)))
                share = score.masked_fill(~used[..., None], -torch.inf).softmax(1)
                return (share * tokens).sum(1)

    def input_loss(
        self,
        reading: AttributeReading,
        ids: Int64[Tensor, "batch pos"],
        used: Bool[Tensor, "batch pos"],
        embedding: Float[Tensor, "d_vocab d_embed"],
    ) -> losses.Scalar:
        """Return the loss of the decoder: nats per word or token, or a distance of embeddings."""
        if self._decoder == "token":
            log_p = (self.decoder(reading.tokens) @ embedding.detach().T).log_softmax(-1)
            return losses.token_loss(log_p, ids, used)
        counts = self.counts(ids, used)
        if self._decoder == "bow":
            return losses.word_loss(self.word_log_p(reading.phi), counts)
        total = (counts @ self.idf).clamp_min(1e-6)[:, None]
        return losses.embedding_loss(self.decoder(reading.phi), counts @ self.word_vectors / total)

    def counts(
        self, ids: Int64[Tensor, "batch pos"], used: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch word"]:
        """Return how often each text has each word of the decoder."""
        return count_words(ids, used, self.word_column, len(self.word_ids))

    def word_log_p(self, phi: Float[Tensor, "batch attribute"]) -> Float[Tensor, "batch word"]:
        """Return log p(word | attributes): log softmax(log frequency + W_d phi)."""
        return (self.log_frequency + self.decoder(phi)).log_softmax(-1)

    def extra_repr(self) -> str:
        """Say what kind it is."""
        return f"pooling={self._pooling}, head={self._head}, decoder={self._decoder}"


def counted_tokens(is_token: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Return the tokens that count: those that a classifier pools."""
    return pooled_tokens(is_token.shape[1], is_token.sum(1))


def embedding_of(network: Any) -> Float[Tensor, "d_vocab d_embed"]:
    """Return the table of a model's token embeddings."""
    return network.get_input_embeddings().weight
