//! Images as PNG: one by one, and in a grid for people to look at.

use std::io::{self, Write};

use crate::model::source::Geometry;

/// Pixels between images.
const GAP: usize = 2;

/// u8 images `[N, C, H, W]` as a PNG file with `columns` images a row, small ones enlarged. One channel is drawn grey, three
/// as RGB; of any other number the first is drawn grey.
pub fn png_of_all(images: &[u8], geometry: Geometry, columns: usize) -> io::Result<Vec<u8>> {
    let (columns, zoom) = (columns.max(1), (96 / geometry.width.max(1)).clamp(1, 8));
    let count = images.len() / geometry.pixels().max(1);
    let rows = count.div_ceil(columns).max(1);
    let (cell_w, cell_h) = (geometry.width * zoom + GAP, geometry.height * zoom + GAP);
    let (width, height) = (columns * cell_w + GAP, rows * cell_h + GAP);
    let colour = geometry.channels == 3;
    let plane = geometry.height * geometry.width;
    let mut canvas = vec![0u8; width * height * 3];
    for (index, image) in images.chunks_exact(geometry.pixels().max(1)).enumerate() {
        let (left, top) = (GAP + index % columns * cell_w, GAP + index / columns * cell_h);
        for y in 0..geometry.height * zoom {
            for x in 0..geometry.width * zoom {
                let from = y / zoom * geometry.width + x / zoom;
                let to = ((top + y) * width + left + x) * 3;
                for channel in 0..3 {
                    canvas[to + channel] = image[if colour { channel * plane + from } else { from }];
                }
            }
        }
    }
    let mut file = Vec::new();
    encode(&mut file, &canvas, (width, height), png::ColorType::Rgb)?;
    Ok(file)
}

/// A u8 image `[C, H, W]` as a PNG file of its size: one channel is grey, three are RGB, and of any other number a PNG
/// cannot be made.
pub fn png(image: &[u8], geometry: Geometry) -> io::Result<Vec<u8>> {
    let plane = geometry.height * geometry.width;
    let (pixels, colour) = match geometry.channels {
        1 => (image.to_vec(), png::ColorType::Grayscale),
        3 => {
            let (red, rest) = image.split_at(plane.min(image.len()));
            let (green, blue) = rest.split_at(plane.min(rest.len()));
            let pixels = red.iter().zip(green).zip(blue).flat_map(|((r, g), b)| [*r, *g, *b]).collect();
            (pixels, png::ColorType::Rgb)
        }
        channels => {
            let problem = format!("a PNG holds one channel or three, and these images have {channels}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
    };
    let mut file = Vec::new();
    encode(&mut file, &pixels, (geometry.width, geometry.height), colour)?;
    Ok(file)
}

fn encode(out: impl Write, pixels: &[u8], (width, height): (usize, usize), colour: png::ColorType) -> io::Result<()> {
    let mut encoder = png::Encoder::new(out, width as u32, height as u32);
    encoder.set_color(colour);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(())
}
