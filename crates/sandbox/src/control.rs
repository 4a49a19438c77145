//! The socket between a supervisor and its stage: what to run goes in, what became of it comes out.
//!
//! The stage's end is its standard input. Its end of file tells the stage that the supervisor has exited.

use std::{
    fmt,
    io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use serde::{Deserialize, Serialize};

use crate::{Failure, Spec};

/// The longest specification: 256 variables of at most 64 KiB, and as many arguments.
const MAX_SPEC: usize = 64 << 20;
/// The most descriptors that a stage holds: the ports of an instance.
const MAX_HELD: usize = 16;
/// The longest report.
const MAX_REPORT: u64 = 64 << 10;
/// How long a step of the start may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// What a stage reports, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// It is in its inner user namespace, whose ids the supervisor must map.
    NeedsIds,
    /// A step failed; the stage exits.
    Failed(Failure),
    /// The program runs.
    Started,
    /// The program ended; what it left behind is about to be killed.
    Ended(Exit),
}

/// What a supervisor asks of a stage that has its specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// The ids are mapped.
    IdsMapped = 1,
    /// Send SIGTERM to every process.
    Terminate = 2,
}

/// The supervisor's end.
#[derive(Debug)]
pub(crate) struct SupervisorEnd(BufReader<UnixStream>);

/// The stage's end.
#[derive(Debug)]
pub(crate) struct StageEnd(UnixStream);

/// The supervisor's end, and the standard input for the stage.
pub(crate) fn pair() -> io::Result<(SupervisorEnd, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(STEP_TIMEOUT))?;
    ours.set_write_timeout(Some(STEP_TIMEOUT))?;
    Ok((SupervisorEnd(BufReader::new(ours)), theirs.into()))
}

impl SupervisorEnd {
    /// Sends the specification, and at most [`MAX_HELD`] descriptors for the stage to hold, which are closed here.
    pub(crate) fn send_spec(&mut self, spec: &Spec, hold: Vec<OwnedFd>) -> io::Result<()> {
        let text = serde_json::to_vec(spec)?;
        let length = u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes();
        let held: Vec<_> = hold.iter().map(OwnedFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_HELD))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !held.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&held)) {
            return Err(io::Error::other(format!("at most {MAX_HELD} descriptors can be held")));
        }
        rustix::net::sendmsg(self.0.get_ref(), &[IoSlice::new(&length)], &mut rights, SendFlags::NOSIGNAL)?;
        drop(hold);
        self.0.get_mut().write_all(&text)
    }

    pub(crate) fn send(&mut self, request: Request) -> io::Result<()> {
        self.0.get_mut().write_all(&[request as u8])
    }

    /// Waits for a report; `None` if the stage has closed its end.
    pub(crate) fn receive(&mut self) -> io::Result<Option<Report>> {
        let mut line = Vec::new();
        (&mut self.0).take(MAX_REPORT).read_until(b'\n', &mut line)?;
        if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_slice(&line)?)) }
    }
}

impl StageEnd {
    /// Takes the socket from standard input, which becomes `/dev/null`.
    pub(crate) fn from_stdin() -> io::Result<Self> {
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
        rustix::stdio::dup2_stdin(null)?;
        Ok(Self(socket.into()))
    }

    /// Waits for the specification and the descriptors to hold; `None` if the supervisor doesn't need the stage.
    pub(crate) fn receive_spec(&mut self) -> io::Result<Option<(Spec, Vec<OwnedFd>)>> {
        let mut length = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_HELD))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut length)], &mut rights, flags)
        })?;
        if received.bytes != length.len() {
            return Ok(None);
        }
        let mut hold = Vec::new();
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                hold.extend(descriptors);
            }
        }
        let length = usize::try_from(u64::from_le_bytes(length)).ok().filter(|length| *length <= MAX_SPEC);
        let mut text = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
        self.0.read_exact(&mut text)?;
        Ok(Some((serde_json::from_slice(&text)?, hold)))
    }

    pub(crate) fn send(&mut self, report: &Report) -> io::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        self.0.write_all(&line)
    }

    /// Waits until the ids are mapped.
    pub(crate) fn wait_for_ids(&mut self) -> io::Result<()> {
        match self.receive()? {
            Some(request) if request == Request::IdsMapped as u8 => Ok(()),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Waits for a request; `None` if the supervisor has exited.
    pub(crate) fn receive(&mut self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        loop {
            match self.0.read(&mut byte) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(byte.first().copied()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Fails if the supervisor has exited.
    pub(crate) fn check_connected(&self) -> io::Result<()> {
        let mut socket = [PollFd::new(&self.0, PollFlags::RDHUP)];
        rustix::event::poll(&mut socket, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let hung_up = socket.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::RDHUP));
        if hung_up { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

impl AsFd for SupervisorEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
