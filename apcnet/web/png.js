/* Writes labels to a PNG as apcnet.predict does: palette indices, or 16-bit grey levels for more than 256 classes. */

const TABLE = Uint32Array.from({length: 256}, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

export async function labelsPng(labels, width, height, palette) {
  const wide = labels.BYTES_PER_ELEMENT > 1, bytes = wide ? 2 : 1;
  const lines = new Uint8Array(height * (width * bytes + 1)); // each line starts with a 0: no filter
  for (let y = 0, to = 0; y < height; y++) {
    to++;
    for (let x = 0; x < width; x++) {
      const label = labels[y * width + x];
      if (wide) lines[to++] = label >> 8;
      lines[to++] = label & 255;
    }
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8 * bytes);
  header.setUint8(9, wide ? 0 : 3);
  const packed = new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Blob([
    Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a),
    chunk("IHDR", new Uint8Array(header.buffer)),
    ...(wide ? [] : [chunk("PLTE", Uint8Array.from(palette.flat()))]),
    chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
    chunk("IEND", new Uint8Array()),
  ], {type: "image/png"});
}

function chunk(name, content) {
  const bytes = new Uint8Array(12 + content.length), view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set([...name].map(letter => letter.charCodeAt(0)), 4);
  bytes.set(content, 8);
  let remainder = 0xffffffff;
  for (const byte of bytes.subarray(4, 8 + content.length)) remainder = TABLE[(remainder ^ byte) & 255] ^ (remainder >>> 8);
  view.setUint32(8 + content.length, (remainder ^ 0xffffffff) >>> 0);
  return bytes;
}
