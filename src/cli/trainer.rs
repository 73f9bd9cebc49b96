//! What the commands of all trainers share: checked numbers, bounded patience, and hearing of SIGINT and SIGTERM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Nobody waits longer for a daemon; keeps deadlines within what clocks can hold.
pub(super) const LONGEST_PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Refuses a flag's number that is not finite, or negative, or, unless `zero` is allowed, zero.
pub(super) fn positive(name: &str, value: f64, zero: bool) -> anyhow::Result<()> {
    let right = value.is_finite() && (value > 0.0 || zero && value == 0.0);
    anyhow::ensure!(right, "{name} is {value}; give a {} number", if zero { "non-negative" } else { "positive" });
    Ok(())
}

/// Set by SIGINT or SIGTERM: the training then saves what it has and ends. A second signal ends the process at once.
pub(super) fn stop_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            for count in 0.. {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                if count > 0 {
                    crate::native::exit_now(130);
                }
                seen.store(true, Ordering::Relaxed);
            }
        });
    })?;
    Ok(stop)
}
