-- How much of the batch a tenant may take in this claim. Follows affinity.lua, before claim.lua.
-- No other job of a tenant starts before the one that does not fit its limit yet, but those of a more urgent lane: else a job of many
-- rows would wait for as long as there are small ones. `k_tenant_room_for` tells claims of other queues so, for a moment.

local SHARES = {}  -- what claim.lua calls; the rest is of this block

do
  local ROOM_MS = 3000  -- how long after a claim saw the job
  local LANES = {interactive = 1, default = 2, bulk = 3}
  local shares = {}  -- by tenant, what this claim has read

  -- `limit` and `running`: rows; `room_for`: the queue whose job waits for room; `is_full`: its next job was seen not to fit.
  local function share_of(tenant)
    if not shares[tenant] then
      local limit = limit_of(tenant, LIMIT.running)
      local room_for = limit and redis.pcall('GET', k_tenant_room_for(tenant))
      shares[tenant] = {
        limit = limit or math.huge, running = limit and members_of(k_tenant_running(tenant)) or 0,
        room_for = type(room_for) == 'string' and room_for or nil,
      }
    end
    return shares[tenant]
  end

  local function urgency(queue) return LANES[string.match(queue, '[^:]*$')] or 4 end

  -- Whether a job of one row may start.
  function SHARES.may_run(tenant, queue)
    local share = share_of(tenant)
    if share.is_full or share.running >= share.limit then return false end
    return not share.room_for or share.room_for == queue or urgency(queue) < urgency(share.room_for)
  end

  -- Whether a tenant's next job fits its limit, if one of one row does. One with more rows than the limit (it was lowered) runs if
  -- nothing else of the tenant does.
  function SHARES.fits_limit(job, queue)
    local share, job_rows = share_of(job.tenant), rows_of(job)
    if share.running + job_rows <= share.limit or share.running == 0 then return true end
    share.is_full = true
    redis.pcall('SET', k_tenant_room_for(job.tenant), queue, 'PX', ROOM_MS)
    return false
  end

  function SHARES.start(id, queue, job)
    local share, job_rows = shares[job.tenant], rows_of(job)
    tolerantly(tenant_runs, id, queue, job.tenant, job_rows)
    if not share then return end
    share.running = share.running + job_rows
    if share.room_for == queue then redis.call('DEL', k_tenant_room_for(job.tenant)) end
  end

  -- Whether the job is one of a tenant that was seen to run as much as it may: not worth a closer look.
  function SHARES.is_held_back(id, queue)
    if not next(shares) then return false end
    local tenant = redis.pcall('HGET', k_job(id), F.tenant)
    return type(tenant) == 'string' and shares[tenant] ~= nil and not SHARES.may_run(tenant, queue)
  end
end
