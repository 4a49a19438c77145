//! Waits until a launched instance is ready.

use std::{
    process::{Child, ExitStatus},
    time::Duration,
};

use gauntlet_domain::{Error, Outputs, Result};
use tokio::time::Instant;

use super::{
    Process,
    blocking::{blocking, failed},
    instance_dir::InstanceDir,
    output, probe, procfs,
    record::{self, LOG, READY, Record, STATE, State},
    step::{run_step, step_span},
    timer::FineTimer,
};

/// The first pause between two probes. Pauses grow up to the scenario's interval, so that a program that starts within a millisecond isn't
/// waited for much longer.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
/// A pause is this fraction of the time since the start.
const PAUSE_DIVISOR: u32 = 6;
/// With pauses from this length on, the program's state is checked after each probe; before that, only after a successful one.
const CHECK_STATE_FROM: Duration = Duration::from_millis(1);
/// How long a supervisor may take to record its state.
const SUPERVISOR_START_TIMEOUT: Duration = Duration::from_secs(5);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// A supervisor that this manager has started.
#[derive(Debug)]
pub(super) struct StartedSupervisor(pub(super) Child);

impl StartedSupervisor {
    /// Its exit status, if it has exited.
    fn exit_status(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }
}

/// The state of the instance's program.
enum ProgramState {
    /// The supervisor has not recorded its start yet.
    Starting,
    Running,
    /// With the reason, for the operator.
    Ended(String),
}

impl Process {
    /// Waits until the instance is ready, and syncs its files `written`. Stops the instance if that fails, so that a retry starts it again.
    pub(super) async fn wait_until_ready(
        &self,
        instance: &InstanceDir,
        record: &Record,
        supervisor: Option<StartedSupervisor>,
        written: &'static [&'static str],
    ) -> Result<Outputs> {
        let synced = {
            let instance = instance.clone();
            blocking(move || instance.sync(written).map_err(failed("start", "syncing its records")))
        };
        let ready = run_step(step_span!("provision.ready", instance), self.probe(instance, record, supervisor));
        let (synced, ready) = futures::join!(synced, ready);
        if let Err(error) = synced.and(ready) {
            if let Err(stop_error) = run_step(step_span!("provision.stop", instance), self.stop(instance)).await {
                tracing::warn!(
                    instance.identity = instance.identity(),
                    error = %stop_error,
                    "an instance that did not become ready cannot be stopped"
                );
            }
            return Err(error);
        }
        // For the next launch; nothing waits for it.
        let standby = self.standby.clone();
        drop(tokio::task::spawn_blocking(move || standby.refill()));
        let Record { launch, .. } = record;
        Ok(Outputs { connection_info: launch.connection_info.clone(), flags: launch.flags.clone() })
    }

    /// Probes the instance until it is ready, and records that.
    async fn probe(
        &self,
        instance: &InstanceDir,
        record: &Record,
        mut supervisor: Option<StartedSupervisor>,
    ) -> Result<()> {
        let readiness = &record.launch.readiness;
        if instance.dir.join(READY).exists() {
            return Ok(());
        }
        let started = Instant::now();
        let timer = FineTimer::new().map_err(failed("ready", "creating a timer"))?;
        loop {
            let left = readiness.timeout.saturating_sub(started.elapsed());
            let timeout = left.clamp(FIRST_PAUSE, PROBE_TIMEOUT);
            let probed =
                probe::check(&readiness.probe, &record.ports, self.probe_address, &instance.dir, timeout).await;
            let pause = (started.elapsed() / PAUSE_DIVISOR).clamp(FIRST_PAUSE, readiness.interval.max(FIRST_PAUSE));
            if probed.is_ok() || left.is_zero() || pause >= CHECK_STATE_FROM.min(readiness.interval) {
                // Checked after the probe: if the program has ended, another one may have answered on its port.
                let state = self.program_state(instance, &mut supervisor, started.elapsed(), probed.is_ok());
                match state.await? {
                    ProgramState::Running if probed.is_ok() => return Ok(()),
                    ProgramState::Starting | ProgramState::Running => {}
                    ProgramState::Ended(reason) => {
                        return Err(Error::Provision {
                            step: "ready",
                            detail: format!("{reason}{}", output_tail(instance, record).await),
                        });
                    }
                }
            }
            if left.is_zero() {
                return Err(Error::Provision {
                    step: "ready",
                    detail: format!(
                        "{} did not succeed within {:?}; the last attempt: {}{}",
                        probe::describe(&readiness.probe, &record.ports, self.probe_address),
                        readiness.timeout,
                        probed.err().unwrap_or_else(|| "it succeeded, but the supervisor has not started".to_owned()),
                        output_tail(instance, record).await
                    ),
                });
            }
            timer.sleep(pause.min(left)).await.map_err(failed("ready", "waiting for the next probe"))?;
        }
    }

    /// Returns the program's state. Records that the instance is ready if it runs and was `probed` successfully.
    async fn program_state(
        &self,
        instance: &InstanceDir,
        supervisor: &mut Option<StartedSupervisor>,
        elapsed: Duration,
        probed: bool,
    ) -> Result<ProgramState> {
        let exited = supervisor.as_mut().and_then(|supervisor| Some((supervisor.exit_status()?, supervisor.0.id())));
        let (instance, program) = (instance.clone(), self.supervisor.clone());
        blocking(move || {
            let read =
                || record::read::<State>(&instance.dir, STATE).map_err(failed("find", format!("reading {STATE}")));
            let ended = |end: record::End| ProgramState::Ended(format!("the program {}", end.reason));
            Ok(match (read()?, exited) {
                (Some(State { end: Some(end), .. }), _) => ended(end),
                (Some(state), _) if procfs::is_running(state.supervisor) => {
                    if probed {
                        std::fs::write(instance.dir.join(READY), "")
                            .map_err(failed("ready", "recording that it is ready"))?;
                    }
                    ProgramState::Running
                }
                // It may have recorded the end and exited since the state was read.
                (Some(last), _) => match read()? {
                    Some(State { end: Some(end), .. }) => ended(end),
                    _ => {
                        let pid = u32::try_from(last.supervisor.pid).unwrap_or(0);
                        ProgramState::Ended(format!("its supervisor was killed{}", last_log_line(&instance, pid)))
                    }
                },
                (None, Some((status, pid))) => ProgramState::Ended(format!(
                    "its supervisor {} ended with {status}{}",
                    program.display(),
                    last_log_line(&instance, pid)
                )),
                (None, None) if elapsed < SUPERVISOR_START_TIMEOUT => ProgramState::Starting,
                (None, None) => ProgramState::Ended(format!(
                    "its supervisor {} did not record its start within {SUPERVISOR_START_TIMEOUT:?}",
                    program.display()
                )),
            })
        })
        .await
    }
}

/// The last lines of output, as the end of an error message.
async fn output_tail(instance: &InstanceDir, record: &Record) -> String {
    let (instance, secrets) = (instance.clone(), record.launch.flags.clone());
    match blocking(move || Ok(output::tail(&instance.dir, &secrets))).await.unwrap_or_default() {
        tail if tail.is_empty() => "; it wrote no output".to_owned(),
        tail => format!("; its last output:\n{tail}"),
    }
}

/// The last line that this supervisor has logged, in parentheses. Blocks.
fn last_log_line(instance: &InstanceDir, pid: u32) -> String {
    let log = std::fs::read_to_string(instance.dir.join(LOG)).unwrap_or_default();
    let line = log.lines().rev().find_map(|line| Some(line.split_once(&record::log_prefix(pid))?.1));
    line.map(|line| format!(" ({line})")).unwrap_or_default()
}
