//! How a trainer tells how far it is: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Plain lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The state of a training, as shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// Training steps made.
    pub step: u64,
    /// 0..1.
    pub done: f64,
    /// The mean loss of the last steps.
    pub loss: f64,
    /// The student still learns block by block, which is another loss than the one after it.
    pub blockwise: bool,
    /// Agreement of the student with the teacher's class on training batches, 0..1.
    pub agreement: f64,
    /// Accuracy on the test file, 0..1, once measured.
    pub accuracy: Option<f64>,
    /// Images received.
    pub received: u64,
    /// Images drawn for training.
    pub consumed: u64,
    /// Versions pushed.
    pub pushed: u64,
}

/// Shows [`State`]s.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    began: Instant,
    /// Images drawn before this process began.
    before: u64,
    shown: Option<Instant>,
}

impl Progress {
    /// A bar where standard error is a terminal.
    /// `consumed`: images drawn by earlier parts of a resumed training.
    pub fn new(consumed: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(1000);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, began: Instant::now(), before: consumed, shown: None }
    }

    /// Shows a state, unless one was shown just now.
    pub fn show(&mut self, state: State) {
        match &self.bar {
            Some(bar) => {
                bar.set_position((state.done * 1000.0) as u64);
                bar.set_message(self.line(state));
            }
            None if self.shown.is_none_or(|shown| shown.elapsed() >= LINE_EVERY) => {
                eprintln!("distill: {:>3.0} %  {}", state.done * 100.0, self.line(state));
                self.shown = Some(Instant::now());
            }
            None => {}
        }
    }

    /// Shows the last state.
    pub fn finish(&mut self, state: State) {
        match self.bar.take() {
            Some(bar) => bar.finish_with_message(self.line(state)),
            None => eprintln!("distill: done  {}", self.line(state)),
        }
    }

    fn line(&self, state: State) -> String {
        let rate = state.consumed.saturating_sub(self.before) as f64 / self.began.elapsed().as_secs_f64().max(1e-9);
        let accuracy =
            state.accuracy.map_or(String::new(), |accuracy| format!("accuracy {:.1} %  ", accuracy * 100.0));
        let phase = if state.blockwise { "  block by block" } else { "" };
        format!(
            "step {}{phase}  loss {:.3}  agreement {:.1} %  {accuracy}images/s {rate:.0}  received {}  pushed {}",
            state.step,
            state.loss,
            state.agreement * 100.0,
            state.received,
            state.pushed
        )
    }
}
