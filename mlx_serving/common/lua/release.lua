-- Hands jobs back to their queues, uncharged: drain, no room, or too big for this worker.
-- ARGV: two prefixes, worker, iso (the wall clock's time in RQ's form), then for each job:
--   id, epoch, nonce                  the attempt
--   needed_tokens, needed_rows        what it needs of a worker; 0: not known, its control hash stays as it is
-- Returns for each job: OK | DUP (already queued) | FENCED.
local worker, iso = ARGV[3], ARGV[4]
local FIRST_JOB, ARGUMENTS = 5, 5
local READ = attempt_fields('cancel_reason')
local replies = {}

local function release(id, epoch, nonce, needed_tokens, needed_rows)
  local job = find_fields(id, READ)
  if not runs(job, worker, epoch, nonce) then
    LOSSES.forgive(id, nonce)
    return job.state == 'queued' and is_attempt(job, epoch, nonce) and 'DUP' or 'FENCED'
  end
  if end_cancelled(id, job, iso, now_ms()) then return 'OK' end  -- nobody needs to claim it again to find out
  set_fields(id, {
    needed_tokens = needed_tokens > 0 and int(needed_tokens) or nil,
    needed_rows = needed_rows > 0 and int(needed_rows) or nil,
  })
  requeue(id, job.queue, worker, epoch)
  return 'OK'
end

for at = FIRST_JOB, #ARGV, ARGUMENTS do
  local id, epoch, nonce, needed_tokens, needed_rows = unpack(ARGV, at, at + ARGUMENTS - 1)
  replies[#replies + 1] = release(id, epoch, nonce, tonumber(needed_tokens), tonumber(needed_rows))
end
return answer(replies)
