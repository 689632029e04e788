"""One image in the modes, formats and orientations that clients send, as bytes of files."""

import io

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 0x0112


def image_variants(image: Image.Image) -> dict[str, bytes]:
    """Files of an RGB image, by name; some of them no reader takes."""
    rgb, grey = image.convert("RGB"), image.convert("L")
    ramp = np.linspace(0, 255, image.width).astype(np.uint8)
    alpha = Image.fromarray(np.tile(ramp, (image.height, 1)))
    rgba, pale = rgb.copy(), grey.copy()
    rgba.putalpha(alpha)
    pale.putalpha(alpha)
    palette = rgb.quantize(16)
    few = rgb.quantize(16).convert("RGB").quantize(8)
    deep = np.asarray(grey).astype(np.uint16) * 257
    dark = (np.asarray(grey).astype(np.uint16) * 16).clip(0, 4000)
    real = np.asarray(grey).astype(np.float32)
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    found = {
        "PNG 1": saved(grey.convert("1"), "PNG"),
        "PNG L": saved(grey, "PNG"),
        "PNG L with a transparent grey": saved(grey, "PNG", transparency=int(np.asarray(grey)[0, 0])),
        "PNG LA": saved(pale, "PNG"),
        "PNG P": saved(palette, "PNG"),
        "PNG P of 8": saved(few, "PNG", bits=4),
        "PNG P with a transparent colour": saved(palette, "PNG", transparency=0),
        "PNG P with alpha": saved(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "PNG RGB": saved(rgb, "PNG"),
        "PNG RGB with a transparent colour": saved(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        "PNG RGBA": saved(rgba, "PNG"),
        "PNG I;16": saved(Image.fromarray(deep), "PNG"),
        "PNG I;16, dark": saved(Image.fromarray(dark), "PNG"),
        "PNG I": saved(Image.fromarray(deep.astype(np.int32)), "PNG"),
        "JPEG L": saved(grey, "JPEG"),
        "JPEG RGB": saved(rgb, "JPEG"),
        "JPEG RGB, progressive": saved(rgb, "JPEG", progressive=True),
        "JPEG CMYK": saved(rgb.convert("CMYK"), "JPEG"),
        "MPO": saved(rgb, "MPO", save_all=True, append_images=[rgb.resize((16, 16))]),
        "WebP RGB": saved(rgb, "WEBP"),
        "WebP RGB, lossless": saved(rgb, "WEBP", lossless=True),
        "WebP RGBA": saved(rgba, "WEBP", lossless=True),
        "WebP, animated": saved(rgb, "WEBP", save_all=True, append_images=[rgba]),
        "GIF": saved(palette, "GIF"),
        "GIF L": saved(grey, "GIF"),
        "GIF with a transparent colour": saved(palette, "GIF", transparency=3),
        "GIF, animated": saved(palette, "GIF", save_all=True, append_images=[rgb.transpose(0).quantize(16)]),
        "TIFF 1": saved(grey.convert("1"), "TIFF"),
        "TIFF L": saved(grey, "TIFF"),
        "TIFF LA": saved(pale, "TIFF"),
        "TIFF P": saved(palette, "TIFF"),
        "TIFF RGB": saved(rgb, "TIFF"),
        "TIFF RGB, LZW": saved(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF RGBA": saved(rgba, "TIFF"),
        "TIFF CMYK": saved(rgb.convert("CMYK"), "TIFF"),
        "TIFF YCbCr": saved(rgb.convert("YCbCr"), "TIFF"),
        "TIFF LAB": saved(lab, "TIFF"),
        "TIFF I;16": saved(Image.fromarray(deep), "TIFF"),
        "TIFF I": saved(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "TIFF F of 0..255": saved(Image.fromarray(real), "TIFF"),
        "TIFF F of 0..1": saved(Image.fromarray(real / 255), "TIFF"),
        "TIFF F with NaN": saved(Image.fromarray(np.where(real > 200, np.nan, real)), "TIFF"),
        "TIFF of two images": saved(rgb, "TIFF", save_all=True, append_images=[rgb.transpose(0)]),
        "BMP 1": saved(grey.convert("1"), "BMP"),
        "BMP L": saved(grey, "BMP"),
        "BMP P": saved(palette, "BMP"),
        "BMP RGB": saved(rgb, "BMP"),
        "BMP RGBA": saved(rgba, "BMP"),
        "PPM": saved(rgb, "PPM"),
        "ICO": saved(rgba.resize((96, 96)), "ICO", sizes=[(96, 96)]),
        "PNG cut short": saved(rgb, "PNG")[:-800],
        "JPEG cut short": saved(rgb, "JPEG")[:-800],
        "no image": b"P6 but no image at all",
        "nothing": b"",
    }
    for number in range(2, 9):
        found[f"JPEG turned {number}"] = saved(rgb, "JPEG", quality=95, exif=orientation(number))
    for kind, number in (("PNG", 3), ("PNG", 6), ("WEBP", 8), ("TIFF", 5), ("JPEG", 0), ("JPEG", 9), ("PNG", 777)):
        found[f"{kind} turned {number}"] = saved(rgb, kind, exif=orientation(number))
    found["JPEG with damaged EXIF"] = saved(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02")
    return found


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return exif
