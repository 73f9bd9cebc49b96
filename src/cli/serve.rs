//! `dreamfeed serve`: the daemon.

use std::path::PathBuf;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, ServeOptions};
use crate::{server, telemetry};

/// Run the daemon: dream images from a teacher and stream them over gRPC.
///
/// Every setting can stand in a TOML file (--config), in the environment, or on the command line; the later wins. A
/// setting's key in the file is its name here with underscores, in a section where it belongs to one ([source],
/// [synthesis], [log], [demand], [students], [limits]); its variable is DREAMFEED_ and that path in capitals.
///
/// For example --batch-size is batch_size under [synthesis], or DREAMFEED_SYNTHESIS_BATCH_SIZE; --listen is listen, or
/// DREAMFEED_LISTEN; --log-max-bytes is max_bytes under [log], or DREAMFEED_LOG_MAX_BYTES; --demand is mode under
/// [demand]; and
/// --max-student-bytes, --max-pushes, --max-fetches, --kept-students, --push-idle-timeout and --push-timeout are max_bytes,
/// max_pushes, max_fetches, kept_versions, idle_timeout and push_timeout under [students]. Of --max-request-bytes and its
/// like the keys under [limits] have no max in front: request_bytes, message_bytes, connections, admin_connections,
/// streams_per_connection, header_timeout and call_timeout.
// What is in brackets are sections of the file, and this is what --help prints.
#[allow(rustdoc::broken_intra_doc_links)]
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Read settings from this TOML file.
    #[arg(long, value_name = "FILE", env = "DREAMFEED_CONFIG")]
    pub config: Option<PathBuf>,
    /// Drain when the process that started this one ends.
    #[arg(long, hide = true)]
    pub end_with_parent: bool,
    /// The settings.
    #[command(flatten)]
    pub options: ServeOptions,
}

/// Raises the soft limit on open files to the hard one, and says what it then is.
fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Serves until SIGTERM or SIGINT. `problems`: what is wrong with the flags, to be told with all that is wrong elsewhere.
pub fn run(args: Args, problems: Vec<String>) -> anyhow::Result<()> {
    let mut config = Config::load(&args.options, problems, args.config.as_deref(), std::env::vars_os())?;
    telemetry::install_logs(config.log_format, EnvFilter::try_new(&config.log_filter)?);
    config.limits = config.limits.within(raise_descriptors());
    if args.end_with_parent {
        // The signal that would be sent at the parent's end is sent by nobody where it has ended already; then this one has
        // another parent by now, and goes on: that window is a few milliseconds of its start.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    }
    let listeners = server::bind(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("dreamfeed-io").build()?;
    let result = runtime.block_on(server::run(config, listeners));
    // Whatever is still open has had its deadline.
    runtime.shutdown_background();
    Ok(result?)
}
