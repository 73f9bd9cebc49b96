//! The golden sample of a file: what PyTorch made of two images that everybody can draw, which a reader reproduces before the
//! network serves. `docs/network-format.md` says how it lies in a file.

use tch::{Device, Kind, TchError, Tensor};

use super::checkpoint::Checkpoint;
use super::families::resnet;
use super::graph::shape::{Cost, Shapes};
use super::graph::{Graph, GraphError, METADATA_KEY, RESERVED};
use super::network::to_device;
use super::source::Geometry;
use super::spec::NetworkSpec;
use super::train::GraphNetwork;

/// Of the largest absolute value: what a reader may differ by, in f32.
const TOLERANCE: f64 = 1e-3;
/// Of one image, in a file that brings a graph: some hundred times what the largest public classifiers take.
const MAX_MULTIPLY_ADDS: u64 = 1 << 42;
/// As many elements of all its values together: some ten times as many.
const MAX_ACTIVATIONS: u64 = 1 << 31;

/// What a file's golden sample says about the network that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// It computes what PyTorch computed.
    Proven,
    /// The file has no golden sample.
    Unproven,
}

/// Why a network is not what its file says.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// A tensor of the sample is there without another, or of another shape.
    #[error("its golden sample is not whole: {name} is {found}, {expected:?} is right; export the network again")]
    Malformed {
        /// The tensor.
        name: String,
        /// Its shape, or that it is missing.
        found: String,
        /// Its shape as the network has it.
        expected: Vec<i64>,
    },
    /// The network computes something else.
    #[error(
        "the network does not compute what it computed where it was exported: {name} differs by {difference:.1e} of its largest \
         value, at most {TOLERANCE:.0e} is right; export it again from the module whose weights these are"
    )]
    Differs {
        /// The first tensor of the sample that is not reproduced.
        name: String,
        /// Of its largest absolute value.
        difference: f64,
    },
    /// The file's graph is none.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// An image costs more than any classifier that can be used here.
    #[error(
        "one image costs {multiply_adds} multiply-adds and {activations} elements; at most {MAX_MULTIPLY_ADDS} and \
         {MAX_ACTIVATIONS} are taken", multiply_adds = .0.multiply_adds, activations = .0.activations
    )]
    Cost(Cost),
    /// The graph takes images of another size than the file says.
    #[error("its graph takes images of {graph}, and the file is said to take {file}; one of the two is right")]
    Size {
        /// Of the graph.
        graph: Geometry,
        /// Of metadata or flags.
        file: Geometry,
    },
    /// The file's graph is not what the architecture's name means.
    #[error(
        "its graph computes something else than {arch}: their logits differ by {difference:.1e} of the largest; give the name of \
         the network that it is"
    )]
    Contradiction {
        /// The name.
        arch: String,
        /// Of the largest absolute value.
        difference: f64,
    },
    /// libtorch failed.
    #[error("its golden sample cannot be computed: {0}")]
    Run(#[from] TchError),
}

/// The two images, `[2, C, H, W]` in row-major order, each element in [-2, 2).
pub fn images(size: Geometry) -> Vec<f32> {
    let element = |index: u64| {
        let mut z = (index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        // 24 bits, which f32 holds exactly.
        (z >> 40) as f32 / (1u32 << 22) as f32 - 2.0
    };
    (0..2 * size.pixels() as u64).map(element).collect()
}

fn batch(size: Geometry, device: Device) -> Result<Tensor, TchError> {
    let shape = [2, size.channels as i64, size.height as i64, size.width as i64];
    Ok(Tensor::from_slice(&images(size)).f_view(shape)?.to_device(device))
}

/// The largest difference, of the largest absolute value that is expected.
fn difference(computed: &Tensor, expected: &Tensor) -> f64 {
    let host = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double);
    let (computed, expected) = (host(computed), host(expected));
    let apart = (computed - &expected).abs().max().double_value(&[]);
    if apart == 0.0 { 0.0 } else { apart / expected.abs().max().double_value(&[]) }
}

/// Checks a file that brings a graph, and whose network is said to be `spec`: that the graph is one, that it computes what it
/// computed where it was exported, and that `spec` computes the same. None where the file brings none.
pub fn check_file(file: &Checkpoint, spec: &NetworkSpec, size: Geometry) -> Result<Option<Proof>, GoldenError> {
    let Some(text) = file.metadata().get(METADATA_KEY) else { return Ok(None) };
    let graph = Graph::parse(text)?;
    let load = |graph: &Graph| -> Result<GraphNetwork, GoldenError> {
        let shapes = Shapes::infer(graph, file)?;
        shapes.check_used(file.tensors().map(|(name, _)| name))?;
        Ok(GraphNetwork::load(graph, &shapes, file, Device::Cpu, Kind::Float)?)
    };
    let network = load(&graph)?;
    let cost = network.shapes().cost;
    if cost.multiply_adds > MAX_MULTIPLY_ADDS || cost.activations > MAX_ACTIVATIONS {
        return Err(GoldenError::Cost(cost));
    }
    if graph.input != size {
        return Err(GoldenError::Size { graph: graph.input, file: size });
    }
    let proof = check(&network, file, Device::Cpu)?;
    let x = batch(size, Device::Cpu)?;
    let known = load(&resnet::graph(spec, [size.height, size.width]))?;
    let difference = difference(&known.logits(&x)?, &network.logits(&x)?);
    if difference.is_nan() || difference > TOLERANCE {
        return Err(GoldenError::Contradiction { arch: spec.arch().to_owned(), difference });
    }
    Ok(Some(proof))
}

/// Reproduces a file's golden sample with the network that was read from it, in f32.
pub fn check(network: &GraphNetwork, file: &Checkpoint, device: Device) -> Result<Proof, GoldenError> {
    let prefix = format!("{RESERVED}golden.");
    if !file.tensors().any(|(name, _)| name.starts_with(&prefix)) {
        return Ok(Proof::Unproven);
    }
    let x = batch(network.graph().input, device)?;
    let (logits, taps) = network.logits_and_taps(&x)?;
    let named = |name: &str, at: usize| format!("{prefix}{name}.{at}");
    let taps = taps
        .into_iter()
        .enumerate()
        .flat_map(|(at, (mean, var))| [(named("mean", at), mean), (named("var", at), var)]);
    for (name, computed) in taps.chain([(format!("{prefix}logits"), logits)]) {
        let golden = file.get(&name);
        let malformed =
            |found: String| GoldenError::Malformed { name: name.clone(), found, expected: computed.size() };
        let raw = golden.ok_or_else(|| malformed("missing".to_owned()))?;
        let golden = to_device(&raw, Kind::Double, Device::Cpu)
            .filter(|golden| golden.size() == computed.size())
            .ok_or_else(|| malformed(format!("{:?} of {:?}", raw.shape, raw.dtype)))?;
        let difference = difference(&computed, &golden);
        // What is not finite on either side is not within.
        if difference.is_nan() || difference > TOLERANCE {
            return Err(GoldenError::Differs { name, difference });
        }
    }
    Ok(Proof::Proven)
}
