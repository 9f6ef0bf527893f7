// Attention, mean-shift and neighbours of one token, as flsl_d2.mean_shift and
// flsl_d2.visualization.described compute them. Tokens lie row by row in one Float32Array.
"use strict";

const Maths = (() => {
  // Patches this near in one image show the same thing twice.
  const APART = 2;

  function bytesOf(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  function floatOfHalf(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  let halves = null;

  /** Little-endian float16 in base64 to a Float32Array. */
  function decodeHalf(base64) {
    halves ??= Float32Array.from({ length: 65536 }, (_, bits) => floatOfHalf(bits));
    const bytes = bytesOf(base64);
    const out = new Float32Array(bytes.length / 2);
    for (let i = 0; i < out.length; i++) out[i] = halves[bytes[2 * i] | (bytes[2 * i + 1] << 8)];
    return out;
  }

  const decodeFloat = (base64) => new Float32Array(bytesOf(base64).buffer);
  const decodeLabels = (base64) => new Uint16Array(bytesOf(base64).buffer);

  function dots(query, tokens) {
    const width = query.length;
    const out = new Float64Array(tokens.length / width);
    for (let i = 0, at = 0; i < out.length; i++) {
      let sum = 0;
      for (let d = 0; d < width; d++) sum += query[d] * tokens[at++];
      out[i] = sum;
    }
    return out;
  }

  const tokenOf = (tokens, width, index) => tokens.subarray(index * width, (index + 1) * width);

  /** softmax_j(scale * q . k_j), N weights of sum 1. */
  function attention(query, tokens, scale) {
    const weights = dots(query, tokens);
    let largest = -Infinity;
    for (const value of weights) largest = Math.max(largest, value);
    let sum = 0;
    for (let i = 0; i < weights.length; i++) {
      weights[i] = Math.exp(scale * (weights[i] - largest));
      sum += weights[i];
    }
    for (let i = 0; i < weights.length; i++) weights[i] /= sum;
    return weights;
  }

  /** Where a token arrives after some steps of mean-shift among all tokens. */
  function mode(query, tokens, scale, iterations) {
    const width = query.length;
    let at = Float64Array.from(query);
    for (let n = 0; n < iterations; n++) {
      const weights = attention(at, tokens, scale);
      const next = new Float64Array(width);
      for (let i = 0, k = 0; i < weights.length; i++)
        for (let d = 0; d < width; d++) next[d] += weights[i] * tokens[k++];
      at = next;
    }
    return at;
  }

  const normOf = (vector) => Math.max(Math.sqrt(dots(vector, vector)[0]), 1e-12);

  /** Cosine similarity of each token with a vector. */
  function cosines(vector, tokens) {
    const out = dots(vector, tokens);
    const own = normOf(vector);
    for (let i = 0; i < out.length; i++)
      out[i] /= own * normOf(tokenOf(tokens, vector.length, i));
    return out;
  }

  /** The most similar tokens in all other images, no two of them side by side. */
  function nearest(sets, columns, width, image, token, count) {
    const query = tokenOf(sets[image], width, token);
    const found = [];
    sets.forEach((tokens, i) => {
      if (i !== image) cosines(query, tokens).forEach((score, j) => found.push([i, j, score]));
    });
    found.sort((a, b) => b[2] - a[2]);
    const taken = [];
    for (const patch of found) {
      if (taken.length === count) break;
      const across = columns[patch[0]];
      const [row, column] = [Math.floor(patch[1] / across), patch[1] % across];
      const near = taken.some(([i, j]) => i === patch[0] && Math.max(
        Math.abs(row - Math.floor(j / across)), Math.abs(column - (j % across))) <= APART);
      if (!near) taken.push(patch);
    }
    return taken;
  }

  return { bytesOf, decodeHalf, decodeFloat, decodeLabels, tokenOf, attention, mode, cosines, nearest };
})();

if (typeof module !== "undefined") module.exports = Maths;
