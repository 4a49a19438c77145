//! Waiting until an instance that was started is ready.

use std::{
    process::{Child, ExitStatus},
    time::Duration,
};

use gauntlet_domain::{Error, Outputs, Result};
use tokio::time::Instant;

use super::{
    Process,
    home::{Home, blocking, failed},
    output, probe, procfs,
    record::{self, LOG, READY, Record, STATE, State},
    step, step_span,
    timer::FineTimer,
};

/// The first pause between two probes. Pauses grow with the time since the start, up to the scenario's interval, so that a program that
/// starts in a millisecond is not waited for longer than that.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
/// Pauses grow to this share of the time since the start.
const PAUSE_SHARE: u32 = 6;
/// The shortest pause beside which it costs nothing to look for a program that has ended.
const LOOK_PAUSE: Duration = Duration::from_millis(1);
/// How long a supervisor may take to say that it is there.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// One probe may take this long.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);

/// A supervisor that this process has started.
#[derive(Debug)]
pub(super) struct Shim(pub(super) Child);

impl Shim {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }
}

/// What is known of a program.
enum Program {
    /// Its supervisor has not said yet that it was started.
    Begins,
    Runs,
    Ended(String),
}

impl Process {
    /// Waits until it is ready and what is recorded of it, `written` included, survives a power cut. One that does not get there is ended,
    /// so that another try begins anew.
    pub(super) async fn settle(
        &self,
        home: &Home,
        record: &Record,
        shim: Option<Shim>,
        written: &'static [&'static str],
    ) -> Result<Outputs> {
        let lasting = {
            let home = home.clone();
            blocking(move || home.make_lasting(written).map_err(failed("start", "making what is recorded last")))
        };
        let ready = step(step_span!("provision.ready", home), self.ready(home, record, shim));
        let (lasting, ready) = futures::join!(lasting, ready);
        if let Err(error) = lasting.and(ready) {
            if let Err(also) = step(step_span!("provision.stop", home), self.stop(home)).await {
                tracing::warn!(instance.identity = home.identity(), error = %also, "an instance that was not ready does not end");
            }
            return Err(error);
        }
        // Beside what follows: for the next launch.
        let standby = self.standby.clone();
        drop(tokio::task::spawn_blocking(move || standby.refill()));
        let Record { launch, .. } = record;
        Ok(Outputs { connection_info: launch.connection_info.clone(), flags: launch.flags.clone() })
    }

    async fn ready(&self, home: &Home, record: &Record, mut shim: Option<Shim>) -> Result<()> {
        let (readiness, marked) = (&record.launch.readiness, home.dir.join(READY));
        if marked.exists() {
            return Ok(());
        }
        let began = Instant::now();
        let timer = FineTimer::new().map_err(failed("ready", "making a timer"))?;
        loop {
            let left = readiness.timeout.saturating_sub(began.elapsed());
            let patience = left.clamp(FIRST_PAUSE, PROBE_PATIENCE);
            let answer = probe::ask(&readiness.probe, &record.ports, self.probed, &home.dir, patience).await;
            let pause = (began.elapsed() / PAUSE_SHARE).clamp(FIRST_PAUSE, readiness.interval.max(FIRST_PAUSE));
            if answer.is_ok() || left.is_zero() || pause >= LOOK_PAUSE.min(readiness.interval) {
                // After the probe: what answered may have been something else on that port, if ours is gone.
                match self.look(home, &mut shim, began.elapsed(), answer.is_ok()).await? {
                    Program::Runs if answer.is_ok() => return Ok(()),
                    Program::Begins | Program::Runs => {}
                    Program::Ended(how) => {
                        return Err(Error::Provision {
                            step: "ready",
                            detail: format!("{how}{}", said(home, record).await),
                        });
                    }
                }
            }
            if left.is_zero() {
                return Err(Error::Provision {
                    step: "ready",
                    detail: format!(
                        "{} was probed for {:?} and at last: {}{}",
                        probe::describe(&readiness.probe, &record.ports, self.probed),
                        readiness.timeout,
                        answer.err().unwrap_or_else(|| "it answered, but its supervisor did not".to_owned()),
                        said(home, record).await
                    ),
                });
            }
            timer.sleep(pause.min(left)).await.map_err(failed("ready", "waiting for the next probe"))?;
        }
    }

    /// Whether the program runs, and how it or its supervisor ended. One that runs and has `answered` is recorded as ready.
    async fn look(&self, home: &Home, shim: &mut Option<Shim>, since: Duration, answered: bool) -> Result<Program> {
        let left = shim.as_mut().and_then(|shim| Some((shim.ended()?, shim.0.id())));
        let (home, program) = (home.clone(), self.shim.clone());
        blocking(move || {
            let state = || record::read::<State>(&home.dir, STATE).map_err(failed("find", format!("reading {STATE}")));
            let ended = |end: record::End| Program::Ended(format!("the program {}", end.how));
            Ok(match (state()?, left) {
                (Some(State { end: Some(end), .. }), _) => ended(end),
                (Some(state), _) if procfs::lives(state.shim) => {
                    if answered {
                        std::fs::write(home.dir.join(READY), "").map_err(failed("ready", "recording that it is"))?;
                    }
                    Program::Runs
                }
                // It may have written its last, and ended, since its state was read.
                (Some(last), _) => match state()? {
                    Some(State { end: Some(end), .. }) => ended(end),
                    _ => {
                        let pid = u32::try_from(last.shim.pid).unwrap_or(0);
                        Program::Ended(format!("its supervisor was killed{}", logged(&home, pid)))
                    }
                },
                (None, Some((status, pid))) => Program::Ended(format!(
                    "its supervisor {} ended with {status}{}",
                    program.display(),
                    logged(&home, pid)
                )),
                (None, None) if since < START_PATIENCE => Program::Begins,
                (None, None) => Program::Ended(format!("its supervisor {} says nothing", program.display())),
            })
        })
        .await
    }
}

/// The last lines of output, to end an error with.
async fn said(home: &Home, record: &Record) -> String {
    let (home, secrets) = (home.clone(), record.launch.flags.clone());
    match blocking(move || Ok(output::tail(&home.dir, &secrets))).await.unwrap_or_default() {
        tail if tail.is_empty() => "; it wrote nothing".to_owned(),
        tail => format!("; its last output:\n{tail}"),
    }
}

/// What that supervisor last had to say about itself. Blocks.
fn logged(home: &Home, pid: u32) -> String {
    let text = std::fs::read_to_string(home.dir.join(LOG)).unwrap_or_default();
    let said = text.lines().rev().find_map(|line| Some(line.split_once(&record::log_prefix(pid))?.1));
    said.map(|said| format!(" ({said})")).unwrap_or_default()
}
