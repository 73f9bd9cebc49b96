//! Choosing where tensors live.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;
use std::sync::Once;

use serde::{Deserialize, Serialize};
use tch::{Cuda, Device, Kind};

use crate::native;

/// Where to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceOption {
    /// The first CUDA device if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize),
}

impl FromStr for DeviceOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = |text: &str| text.parse().ok();
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(index)
                .map(Self::Cuda)
                .ok_or_else(|| format!("device {text:?}: give auto, cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl TryFrom<String> for DeviceOption {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceOption> for String {
    fn from(device: DeviceOption) -> Self {
        device.to_string()
    }
}

/// The requested device is not there.
#[derive(Debug, thiserror::Error)]
#[error(
    "device {wanted} is not available: libtorch sees {count} CUDA device(s); use --device cpu, or run where the driver \
     and libtorch_cuda.so are"
)]
pub struct DeviceError {
    wanted: DeviceOption,
    count: i64,
}

impl DeviceOption {
    /// The libtorch device that this means on this machine.
    pub fn resolve(self) -> Result<Device, DeviceError> {
        if self == Self::Cpu {
            return Ok(Device::Cpu);
        }
        load_cuda_library();
        let count = Cuda::device_count();
        // Every batch has the same shapes: the search for the fastest convolutions is paid once.
        Cuda::cudnn_set_benchmark(count > 0);
        match self {
            Self::Auto | Self::Cpu => Ok(Device::cuda_if_available()),
            Self::Cuda(index) if (index as i64) < count => Ok(Device::Cuda(index)),
            Self::Cuda(_) => Err(DeviceError { wanted: self, count }),
        }
    }
}

/// The element type in which the networks compute; pixels, losses and what is stored stay f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit brain floats: faster where the processor multiplies them natively.
    Bf16,
}

impl Precision {
    /// libtorch's name of it.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

/// Where a local tool runs and with how many threads: the same flags everywhere.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct DeviceArgs {
    /// Where to run: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value_t)]
    device: DeviceOption,
    /// Threads of libtorch's operators; default: one a core.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

impl DeviceArgs {
    /// Flags of a daemon beside this tool, separated by spaces, with these two where they are not among them.
    pub fn for_daemon(self, flags: &str) -> Vec<String> {
        let mut flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        let mut add = |name: &str, value: Option<String>| {
            let given = flags.iter().any(|flag| flag.split('=').next() == Some(name));
            flags.extend(value.filter(|_| !given).into_iter().flat_map(|value| [name.to_owned(), value]));
        };
        add("--device", Some(self.device.to_string()));
        add("--threads", self.threads.map(|threads| threads.to_string()));
        flags
    }

    /// Bounds libtorch's threads and gives the device.
    pub fn prepare(self) -> Result<Device, DeviceError> {
        set_threads(self.threads);
        self.device.resolve()
    }
}

/// Bounds the threads that libtorch's operators use in this process; `None` leaves its default, one a core.
pub fn set_threads(threads: Option<NonZeroUsize>) {
    if let Some(threads) = threads {
        tch::set_num_threads(i32::try_from(threads.get()).unwrap_or(i32::MAX));
    }
}

/// Loads libtorch's CUDA back-end where it is installed.
///
/// The linker drops `libtorch_cuda.so` because no symbol of it is named in this program, and libtorch then reports that
/// there is no CUDA. Loading it runs the static initializers that register the back-end.
fn load_cuda_library() {
    static LOADED: Once = Once::new();
    LOADED.call_once(|| {
        // Without a driver the back-end could register nothing; loading half a gigabyte would be for nothing.
        if !["/dev/nvidiactl", "/dev/dxg"].iter().any(|path| Path::new(path).exists()) {
            return;
        }
        if let Err(error) = native::load_and_keep("libtorch_cuda.so") {
            tracing::warn!(%error, "an NVIDIA driver is there, but libtorch_cuda.so cannot be loaded; running on the CPU");
        }
    });
}
