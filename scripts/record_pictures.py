#!/usr/bin/env python3
"""Make small pictures of every format and record what transformers' image processor sees of them.

  record_pictures.py OUT.safetensors

For each picture NAME the tensor NAME, its file's bytes, and NAME.rgb, uint8 [height, width, 3]: what transformers 5.24
makes of it (convert_to_rgb of its PIL picture, turned upright by its EXIF orientation). Needs numpy, pillow and
transformers; it made tests/data/golden/preprocess/pictures.safetensors.xz.
"""
import io
import json
import struct
import sys
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from transformers.image_transforms import convert_to_rgb

warnings.filterwarnings("ignore")
random = np.random.RandomState(7)
W, H = 23, 17
files = {}


def noise(*shape):
    return random.randint(0, 256, shape).astype(np.uint8)


def smooth(channels, width=W, height=H):
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    return ((y * 11 + x * 7 + c * 60) % 256).astype(np.uint8)


def png(kind, depth, width, rows, chunks=()):
    """rows: bytes of each row, as stored."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", body) +
            chunk(b"IEND", b""))


def saved(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def packed(values, depth):
    """Rows of numbers below 2^depth, most significant bits first."""
    return [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - depth:].ravel()).tobytes() for row in values]


def pngs():
    every = np.stack(np.broadcast_arrays(np.arange(256)[:, None], np.arange(256)[None]), -1).astype(np.uint8)
    la = np.ascontiguousarray(every)  # each value with each alpha
    files["grey_alpha.png"] = saved(Image.fromarray(la, "LA"), "PNG", optimize=True)
    rgba = noise(H, W, 4)
    files["rgba.png"] = png(6, 8, W, [row.tobytes() for row in rgba])
    for name, kind, channels in (("grey16", 0, 1), ("rgb16", 2, 3), ("grey_alpha16", 4, 2), ("rgba16", 6, 4)):
        files[name + ".png"] = png(kind, 16, W, [noise(W * channels * 2).tobytes() for _ in range(H)])
    low = noise(H, W, 2)
    low[..., 0] &= 1  # values around 255
    files["grey16_low.png"] = png(0, 16, W, [row.tobytes() for row in low])
    for depth in (1, 2, 4):
        rows = packed(noise(H, W) >> (8 - depth), depth)
        files[f"grey{depth}.png"] = png(0, depth, W, rows)
        for value in (0, 1, 85):
            files[f"grey{depth}_trns{value}.png"] = png(0, depth, W, rows, [(b"tRNS", struct.pack(">H", value))])
    grey, color = noise(H, W) >> 4, smooth(3)
    files["grey_trns.png"] = png(0, 8, W, [r.tobytes() for r in grey], [(b"tRNS", struct.pack(">H", 5))])
    files["grey_trns_wide.png"] = png(0, 8, W, [r.tobytes() for r in grey], [(b"tRNS", struct.pack(">H", 0x1205))])
    key = color[3, 5]
    color[8:10] = key
    files["rgb_trns.png"] = png(2, 8, W, [r.tobytes() for r in color], [(b"tRNS", struct.pack(">HHH", *key))])
    wide = noise(H, W, 3, 2)
    wide[2:5, :, :, 0], wide[2:5, :, :, 1] = (9, 8, 7), (200, 8, 100)
    for name, value in (("high", (0x09c8, 0x0808, 0x0764)), ("low", (0x1109, 0x2208, 0x3307))):
        files[f"rgb16_trns_{name}.png"] = png(2, 16, W, [r.tobytes() for r in wide],
                                              [(b"tRNS", struct.pack(">HHH", *value))])
    for name, value in (("low", 9), ("white", 0xffff), ("exact", 0x0009)):
        low16 = low.copy()
        low16[4:6] = (0, 9)
        files[f"grey16_trns_{name}.png"] = png(0, 16, W, [r.tobytes() for r in low16],
                                               [(b"tRNS", struct.pack(">H", value))])
    for depth, colors in ((1, 2), (2, 4), (4, 11), (8, 200)):
        palette = noise(colors, 3).tobytes()
        rows = packed((noise(H, W) % colors), depth)
        files[f"palette{depth}.png"] = png(3, depth, W, rows, [(b"PLTE", palette)])
        files[f"palette{depth}_trns.png"] = png(3, depth, W, rows, [(b"PLTE", palette), (b"tRNS", noise(colors - 1).tobytes())])
        files[f"palette{depth}_key.png"] = png(3, depth, W, rows, [(b"PLTE", palette), (b"tRNS", b"\0")])


def exif(orientation):
    data = Image.Exif()
    data[0x112] = orientation
    return data.tobytes()


def xmp(orientation, form='tiff:Orientation="%d"'):
    return ('<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description ' + form % orientation +
            "/></rdf:RDF></x:xmpmeta>").encode()


def oriented():
    image = Image.fromarray(smooth(3))
    alpha = Image.fromarray(smooth(4))
    for orientation in range(1, 9):
        files[f"orientation{orientation}.jpg"] = saved(image, "JPEG", quality=90, exif=exif(orientation))
        files[f"orientation{orientation}.png"] = saved(alpha, "PNG", exif=exif(orientation))
        files[f"orientation{orientation}.webp"] = saved(alpha, "WEBP", lossless=True, exif=exif(orientation))
        files[f"orientation{orientation}.tif"] = saved(image, "TIFF", tiffinfo={274: orientation})
    files["xmp6.jpg"] = saved(image, "JPEG", xmp=xmp(6))
    files["xmp8.webp"] = saved(alpha, "WEBP", lossless=True, xmp=xmp(8))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp(3).decode())
    files["xmp3.png"] = saved(alpha, "PNG", pnginfo=text)
    files["exif1_xmp6.jpg"] = saved(image, "JPEG", exif=exif(1), xmp=xmp(6))
    text = PngImagePlugin.PngInfo()
    block = exif(6)
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    files["raw_exif6.png"] = saved(alpha, "PNG", pnginfo=text)


def jpegs():
    color = Image.fromarray(smooth(3))
    cmyk = Image.fromarray(smooth(4), "CMYK")
    for subsampling in (0, 1, 2):
        files[f"subsampling{subsampling}.jpg"] = saved(color, "JPEG", quality=85, subsampling=subsampling)
    files["progressive.jpg"] = saved(color, "JPEG", progressive=True)
    files["grey.jpg"] = saved(color.convert("L"), "JPEG")
    files["cmyk.jpg"] = saved(cmyk, "JPEG", quality=90)
    files["rgb.jpg"] = saved(color, "JPEG", keep_rgb=True, quality=95)
    # The same bytes read as YCCK: only Adobe's marker says how the four components are meant.
    ycck = files["cmyk.jpg"]
    at = ycck.find(b"Adobe")
    files["ycck.jpg"] = ycck[:at + 11] + b"\x02" + ycck[at + 12:]
    # Without the marker.
    files["cmyk_plain.jpg"] = ycck[:at - 4] + ycck[at + 12:]


def webps():
    color, alpha = Image.fromarray(smooth(3)), Image.fromarray(smooth(4))
    files["lossy.webp"] = saved(color, "WEBP", quality=70)
    files["lossless.webp"] = saved(color, "WEBP", lossless=True)
    files["lossy_alpha.webp"] = saved(alpha, "WEBP", quality=70)
    files["lossless_alpha.webp"] = saved(alpha, "WEBP", lossless=True, exact=True)
    files["animated.webp"] = saved(alpha, "WEBP", lossless=True, save_all=True, append_images=[alpha.rotate(180)])
    # A frame that covers a part of its canvas.
    frame = files["lossless_alpha.webp"]
    frame = frame[12:]
    if frame[:4] == b"VP8X":
        frame = frame[18:]
    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    def u24(value):
        return struct.pack("<I", value)[:3]
    canvas_w, canvas_h = W + 10, H + 6
    for name, flags in (("", 0x12), ("_opaque", 0x02)):
        body = (b"WEBP" + chunk(b"VP8X", bytes([flags, 0, 0, 0]) + u24(canvas_w - 1) + u24(canvas_h - 1)) +
                chunk(b"ANIM", b"\x40\x80\xc0\xff\0\0") +
                chunk(b"ANMF", u24(2) + u24(1) + u24(W - 1) + u24(H - 1) + u24(100) + b"\0" + frame))
        files[f"part{name}.webp"] = b"RIFF" + struct.pack("<I", len(body)) + body


def lzw(indices, bits):
    """GIF's codes, a clear code before each 2^bits - 2 pixels so that they stay short."""
    clear, end, width = 1 << bits, (1 << bits) + 1, bits + 1
    codes = []
    for i, index in enumerate(indices):
        if i % ((1 << bits) - 2) == 0:
            codes.append(clear)
        codes.append(int(index))
    codes.append(end)
    number, length, data = 0, 0, b""
    for code in codes:
        number |= code << length
        length += width
    data = number.to_bytes((length + 7) // 8, "little")
    return bytes([bits]) + b"".join(bytes([len(data[i:i + 255])]) + data[i:i + 255] for i in range(0, len(data), 255)) + b"\0"


def gif(screen, frames, palette=None, background=0):
    """frames: (x, y, indices, palette or None, transparent or None, interlaced)."""
    flags = 0x80 | 2 if palette is not None else 0
    data = b"GIF89a" + struct.pack("<HHBBB", *screen, flags, background, 0) + (palette or b"")
    for x, y, indices, local, transparent, interlaced in frames:
        height, width = indices.shape
        if transparent is not None:
            data += b"!\xf9\x04" + struct.pack("<BHB", 1, 10, transparent) + b"\0"
        data += b"," + struct.pack("<HHHHB", x, y, width, height, (0x80 | 2 if local else 0) | (0x40 if interlaced else 0))
        data += local or b""
        if interlaced:
            order = [*range(0, height, 8), *range(4, height, 8), *range(2, height, 4), *range(1, height, 2)]
            indices = indices[order]
        data += lzw(indices.ravel(), 3)
    return data + b";"


def gifs():
    palette, other, indices = noise(8, 3).tobytes(), noise(8, 3).tobytes(), noise(H, W) % 8
    files["plain.gif"] = gif((W, H), [(0, 0, indices, None, None, False)], palette)
    files["local.gif"] = gif((W, H), [(0, 0, indices, other, None, False)], palette)
    files["interlaced.gif"] = gif((W, H), [(0, 0, indices, None, None, True)], palette)
    files["transparent.gif"] = gif((W, H), [(0, 0, indices, None, 3, False)], palette)
    files["offset.gif"] = gif((W + 9, H + 5), [(4, 2, indices, None, None, False)], palette, background=6)
    files["offset_transparent.gif"] = gif((W + 9, H + 5), [(4, 2, indices, None, 3, False)], palette, background=6)
    files["beyond.gif"] = gif((W - 5, H - 5), [(4, 2, indices, None, None, False)], palette)
    files["no_palette.gif"] = gif((W, H), [(0, 0, indices, None, None, False)])
    files["no_palette_transparent.gif"] = gif((W, H), [(0, 0, indices, None, 3, False)])
    files["animated.gif"] = gif((W, H), [(0, 0, indices, None, None, False), (0, 0, indices[::-1], other, 1, False)], palette)
    files["photo.gif"] = saved(Image.fromarray(smooth(3, 90, 70)).quantize(200), "GIF")


def bmp(depth, rows, palette=b"", compression=0, masks=b"", header=40, top_down=False, width=W, offset=None, colors=0):
    height = len(rows)
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, depth)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, -height if top_down else height, 1, depth, compression,
                           0, 2835, 2835, colors, 0)
        info += (masks + b"\0" * header)[:header - 40] if header > 40 else masks
    body = b"".join(rows if top_down or isinstance(rows, bytes) else rows[::-1])
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start if offset is None else offset) + info + palette + body


def padded(row):
    return row + b"\0" * (-len(row) % 4)


def bmps():
    for depth, colors in ((1, 2), (4, 16), (8, 256)):
        palette = b"".join(noise(3).tobytes() + b"\0" for _ in range(colors))
        rows = [padded(r) for r in packed(noise(H, W) >> (8 - depth), depth)]
        files[f"palette{depth}.bmp"] = bmp(depth, rows, palette)
        files[f"os2_palette{depth}.bmp"] = bmp(depth, rows, b"".join(palette[4 * i:4 * i + 3] for i in range(colors)), header=12)
    files["short_offset.bmp"] = bmp(8, rows, palette, offset=54)
    few = [padded(r) for r in packed(noise(H, W) % 5, 8)]
    files["few_colors.bmp"] = bmp(8, few, palette[:20], colors=5)
    rgb = [padded(r.tobytes()) for r in noise(H, W, 3)]
    files["rgb.bmp"] = bmp(24, rgb)
    files["top_down.bmp"] = bmp(24, rgb, top_down=True)
    files["os2.bmp"] = bmp(24, rgb, header=12)
    files["rgb555.bmp"] = bmp(16, [padded(r.tobytes()) for r in noise(H, W, 2)])
    words = [padded(r.tobytes()) for r in noise(H, W, 2)]
    files["rgb565.bmp"] = bmp(16, words, compression=3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F))
    files["rgb555_masks.bmp"] = bmp(16, words, compression=3, masks=struct.pack("<III", 0x7C00, 0x3E0, 0x1F))
    quads = [r.tobytes() for r in noise(H, W, 4)]
    files["rgb32.bmp"] = bmp(32, quads)
    layouts = {"bgrx": (0xFF0000, 0xFF00, 0xFF, 0), "xbgr": (0xFF000000, 0xFF0000, 0xFF00, 0),
               "bgxr": (0xFF000000, 0xFF00, 0xFF, 0), "abgr": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
               "rgba": (0xFF, 0xFF00, 0xFF0000, 0xFF000000), "bgra": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
               "bgar": (0xFF000000, 0xFF00, 0xFF, 0xFF0000), "zero": (0, 0, 0, 0)}
    for name, masks in layouts.items():
        files[f"masks_{name}.bmp"] = bmp(32, quads, compression=3, masks=struct.pack("<IIII", *masks), header=124)
    palette = b"".join(noise(3).tobytes() + b"\0" for _ in range(256))
    runs = b""
    for y in range(H):  # runs, literals and, on some rows, less than the whole row
        runs += bytes([9, y * 5 + 1]) + bytes([0, 5, 7, 8, 9, 10, 11, 0])
        if y % 3 != 2:
            runs += bytes([W - 14, 200 + y])
        if y == 4:
            continue
        runs += b"\0\0"
    files["rle8.bmp"] = bmp(8, [b""] * H, palette, compression=1) + runs + b"\0\1"
    jump = bytes([5, 17, 0, 2, 3, 2, 4, 33, 0, 0]) + bytes([W, 44, 0, 0]) * (H - 3) + b"\0\1"
    files["rle8_jump.bmp"] = bmp(8, [b""] * H, palette, compression=1) + jump
    runs4 = b"".join(bytes([9, 0x12 + y, 0, 6, 0x34, 0x56, 0x78, 0, W - 15, 0x9a, 0, 0]) for y in range(H)) + b"\0\1"
    files["rle4.bmp"] = bmp(4, [b""] * H, palette[:64], compression=2) + runs4


def tiff(order, entries, data):
    """entries: {tag: (type, values)}; strips and tiles begin at byte 8."""
    kinds = {1: "B", 3: "H", 4: "I"}
    body, extra = b"", b""
    start = 8 + len(data) + len(data) % 2
    entries_at = start + 2 + 12 * len(entries) + 4
    for tag in sorted(entries):
        kind, values = entries[tag]
        raw = struct.pack(order + kinds[kind] * len(values), *values)
        if len(raw) > 4:
            place = struct.pack(order + "I", entries_at + len(extra))
            extra += raw + b"\0" * (len(raw) % 2)
        else:
            place = raw + b"\0" * (4 - len(raw))
        body += struct.pack(order + "HHI", tag, kind, len(values)) + place
    return ((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start) + data + b"\0" * (len(data) % 2) +
            struct.pack(order + "H", len(entries)) + body + b"\0\0\0\0" + extra)


def raw_tiff(order, rows, bits, photometric, more=None, width=W, strip_rows=None):
    samples, strip_rows = len(bits), strip_rows or len(rows)
    strips = [b"".join(rows[i:i + strip_rows]) for i in range(0, len(rows), strip_rows)]
    places = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries = {256: (3, [width]), 257: (3, [len(rows)]), 258: (3, bits), 259: (3, [1]), 262: (3, [photometric]),
               273: (4, places), 277: (3, [samples]), 278: (3, [strip_rows]), 279: (4, list(map(len, strips)))}
    entries.update(more or {})
    return tiff(order, entries, b"".join(strips))


def tiffs():
    color, alpha = Image.fromarray(smooth(3, 70, 40)), Image.fromarray(smooth(4))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        files[f"rgb_{compression}.tif"] = saved(color, "TIFF", compression=compression)
    files["lzw_predictor.tif"] = saved(color, "TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    for compression in ("group3", "group4", "tiff_ccitt"):
        files[f"bits_{compression}.tif"] = saved(color.convert("1"), "TIFF", compression=compression)
    files["grey_jpeg.tif"] = saved(color.convert("L"), "TIFF", compression="jpeg")
    files["la.tif"] = saved(alpha.convert("LA"), "TIFF")
    files["rgba.tif"] = saved(alpha, "TIFF", compression="tiff_lzw")
    files["cmyk.tif"] = saved(Image.fromarray(smooth(4), "CMYK"), "TIFF")
    files["palette.tif"] = saved(color.quantize(30), "TIFF")
    files["pages.tif"] = saved(color, "TIFF", save_all=True, append_images=[color.rotate(180)])
    for order, name in (("<", "ii"), (">", "mm")):
        for depth in (1, 2, 4, 8):
            rows = packed(noise(H, W) >> (8 - depth), depth)
            files[f"{name}_grey{depth}.tif"] = raw_tiff(order, rows, [depth], 1, strip_rows=5)
            files[f"{name}_white{depth}.tif"] = raw_tiff(order, rows, [depth], 0)
            colors = [256 * v + 99 for v in noise(3 << depth).tolist()]
            files[f"{name}_palette{depth}.tif"] = raw_tiff(order, rows, [depth], 3, {320: (3, colors)})
        low = (noise(H, W).astype(np.uint16) * 2)
        files[f"{name}_grey16.tif"] = raw_tiff(order, [r.astype(order + "u2").tobytes() for r in low], [16], 1)
        wide = noise(H, W, 4, 2)
        for samples, photometric, extra, kind in ((3, 2, None, "rgb"), (4, 2, None, "rgb_noextra"), (4, 2, 0, "rgbx"),
                                                  (4, 2, 1, "rgb_premultiplied"), (4, 2, 2, "rgba"), (4, 5, None, "cmyk")):
            more = {338: (3, [extra])} if extra is not None else {}
            for depth in (8, 16):
                rows = [np.ascontiguousarray(r[:, :samples, :depth // 8]).tobytes() for r in wide]
                files[f"{name}_{kind}{depth}.tif"] = raw_tiff(order, rows, [depth] * samples, photometric, more)
    grey = noise(H, W, 2)
    files["grey_x.tif"] = raw_tiff("<", [r.tobytes() for r in grey], [8, 8], 1, {338: (3, [0])})
    files["palette_alpha.tif"] = raw_tiff("<", [r.tobytes() for r in grey], [8, 8], 3,
                                          {338: (3, [2]), 320: (3, [256 * v for v in noise(768).tolist()])})
    files["white16.tif"] = raw_tiff("<", [r.tobytes() for r in grey], [16], 0)
    planes = noise(3, H, W)
    at = [8 + i * H * W for i in range(3)]
    files["planes.tif"] = raw_tiff("<", [p.tobytes() for p in planes.reshape(3 * H, W)], [8] * 3, 2,
                                   {257: (3, [H]), 273: (4, at), 278: (3, [H]), 279: (4, [H * W] * 3), 284: (3, [2])})
    files["fill_order.tif"] = raw_tiff("<", packed(noise(H, W) >> 7, 1), [1], 1, {266: (3, [2])})
    tiles = noise(4, 16, 16, 3)
    files["tiles.tif"] = tiff("<", {256: (3, [W]), 257: (3, [H]), 258: (3, [8] * 3), 259: (3, [1]), 262: (3, [2]),
                                    277: (3, [3]), 322: (3, [16]), 323: (3, [16]),
                                    324: (4, [8 + 768 * i for i in range(4)]), 325: (4, [768] * 4)}, tiles.tobytes())


def write_safetensors(path, arrays):
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "U8", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def main():
    for make in (pngs, oriented, jpegs, webps, gifs, bmps, tiffs):
        make()
    arrays = {}
    for name, data in sorted(files.items()):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        arrays[name] = np.frombuffer(data, np.uint8)
        arrays[name + ".rgb"] = convert_to_rgb(image, return_numpy=True)
    write_safetensors(sys.argv[1], arrays)
    print(len(files), "pictures")


main()
